"""A fault counts as tried only if it did come about, and a launcher that hangs is not one that was killed."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from areal_jax.transport.endpoints import read_endpoint, split_address, write_endpoint
from tools.faults import harness, launcher, stories
from tools.faults.harness import Fault, Run
from tools.faults.matrix import all_faults


class Quick:
    """A run that goes on for as long as a story wants, and whose pauses take no time."""

    def __init__(self, workdir):
        self.workdir, self.struck, self.random = workdir, False, random.Random(0)
        self.random.uniform = lambda low, high: 0.0
        self.launcher = types.SimpleNamespace(poll=lambda: None)
        self.wait = lambda: 0

    def until(self, condition, seconds=1.0):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
        return True


@pytest.fixture
def server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        write_endpoint(tmp_path, "controller", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


@pytest.mark.parametrize("how", ["dropped", "delayed"])
@pytest.mark.parametrize("use", ["nobody's", "connected", "busy"])
def test_a_network_that_nobody_used_did_not_fail(tmp_path, server, monkeypatch, how, use):
    class Wire(stories.Wire):
        def __init__(self, run, name):
            super().__init__(run, name)
            self.client = self._connect() if use != "nobody's" else None

        def _connect(self):
            host, port = split_address(read_endpoint(tmp_path, "controller"))
            return socket.create_connection((host, int(port)))

        def lose(self):
            super().lose()
            self._send(lambda: self.lost)

        def hold(self):
            super().hold()
            self._send(lambda: self.held)

        def _send(self, seen):
            if use == "busy":
                with self._connect() as client:
                    client.sendall(bytes(1000))
                    while not seen():
                        pass

        def close(self):
            super().close()
            if self.client:
                self.client.close()

    monkeypatch.setattr(stories, "Wire", Wire)
    run = Quick(tmp_path)
    stories.bad_network("controller", how)(run)
    assert run.struck is (use == "busy")


@pytest.mark.parametrize("failed", [{"verifier_timeout": 3}, {"verifier_exception": 3}])
def test_a_verifier_is_slow_if_it_was_too_slow(tmp_path, failed):
    (fault,) = [fault for fault in all_faults() if fault.action == "slow"]
    (tmp_path / "summary.json").write_text(json.dumps({"failed": failed}))
    run = Quick(tmp_path)
    fault.story(run)
    assert run.struck is ("verifier_timeout" in failed)


def test_a_guest_that_does_not_end_makes_its_try_wrong_and_no_more(tmp_path, monkeypatch):
    class Guest:
        def __init__(self):
            self.got = []
            self.send_signal, self.kill = self.got.append, lambda: self.got.append("killed")

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("rollout-7", seconds)

    monkeypatch.setattr(stories, "busy", lambda *_: True)
    run, guest = Quick(tmp_path), Guest()
    run.steps, run.start, run.wrong = lambda: 1, lambda *_: guest, []
    stories.comes_and_goes(signal.SIGTERM)(run)
    assert guest.got == [signal.SIGTERM, "killed"] and run.wrong == ["the guest did not end within 60 s"]


@pytest.mark.parametrize("says", ["trainer-0", "trainer-1", "rollout-0"])
def test_a_full_disk_has_come_about_when_any_trainer_process_says_so(tmp_path, monkeypatch, says):
    monkeypatch.setattr(stories, "noticed", lambda run: True)
    run = Quick(tmp_path)
    run.fired, run.ballast, run.until = tmp_path, tmp_path / "ballast", lambda condition, seconds=1.0: condition()
    (tmp_path / "logs").mkdir()
    for name in ("trainer-0", "trainer-1", "rollout-0"):
        (tmp_path / "logs" / f"{name}.log").write_text("RESOURCE_EXHAUSTED" if name == says else "")
    stories.room_again(0.0, "RESOURCE_EXHAUSTED")(run)
    assert run.struck is says.startswith("trainer")


def test_what_must_tell_of_a_full_disk_is_not_on_it(tmp_path, monkeypatch):
    """In a run's folder that its launcher would refuse if there were anything in it before."""
    shown = []
    monkeypatch.setattr(launcher.session, "run", lambda _, workdir: shown.append((Path(workdir) / "logs").resolve()))
    (apart,) = {fault.logs_apart for fault in all_faults() if fault.disk and fault.role == "trainer"}
    run = Run(Fault(role="trainer", action="x", disk=1, logs_apart=apart), tmp_path, 0)
    monkeypatch.setattr(Run, "start", lambda self, command, log: launcher.main(json.loads(command[-1])))
    for _ in range(2):
        run.begin("")
    assert shown == [tmp_path / "logs"] * 2


def test_a_launcher_that_hangs_is_not_taken_for_one_that_was_killed(tmp_path, monkeypatch):
    begun = []

    def begin(self, compile_cache):
        begun.append(compile_cache)
        hangs = [sys.executable, "-c", "import signal; signal.pause()"]
        self.launcher = self.start(hangs, self.folder / "launcher.log")

    monkeypatch.setattr(Run, "begin", begin)
    monkeypatch.setattr(harness, "LIMIT", 0.1)
    monkeypatch.setattr(Run, "left_behind", lambda self, seconds, finished: [])

    def waits_too(run):
        run.wait()
        run.struck = True

    fault = Fault(role="launcher", action="kill", story=waits_too, what="x", launcher_dies=True)
    outcome = harness.run(fault, tmp_path / "x")
    assert outcome.problems == ["the run did not end within 0 s"] and len(begun) == 1
