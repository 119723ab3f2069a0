"""The supervisor's waits have an end, whoever hangs; and what a killed process could not remove is removed for it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from areal_jax.launch import guardian
from areal_jax.launch import supervisor as supervisor_module
from areal_jax.launch.supervisor import Outcome, Role, Supervisor
from areal_jax.transport.endpoints import forget_endpoints, still_starting
from areal_jax.transport.silence import Silence, report_silence

ROOT = Path(__file__).parents[2]
FOREVER = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
UNTIL = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"


class Clock:
    """Goes on by itself, and jumps when told to."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


def role(name, program, *arguments, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return Role(name=name, command=(sys.executable, "-c", program, *map(str, arguments)), env=env, **options)


# Counts its lives in a file. The first one is stuck before it listens; the second announces the same address again.
LATE = """
import signal, sys
from areal_jax.transport.endpoints import write_endpoint
lives, workdir, done = sys.argv[1:]
file = open(lives, 'a+'); file.write('x'); file.flush(); file.seek(0)
if len(file.read()) > 1:
    write_endpoint(workdir, 'controller', 'tcp://127.0.0.1:5')
    open(done, 'w').close()
signal.pause()
"""


def test_a_server_that_hangs_before_it_announces_its_address_is_replaced(tmp_path):
    from areal_jax.transport.endpoints import write_endpoint

    lives, done, clock, told = tmp_path / "lives", tmp_path / "done", Clock(), []
    lives.touch()
    write_endpoint(tmp_path, "controller", "tcp://127.0.0.1:5")  # of a former life
    roles = [
        role("controller", LATE, lives, tmp_path, done, restarts=1, announces=True), role("trainer", UNTIL, done),
    ]  # fmt: skip
    supervisor = Supervisor(
        roles, ["trainer"], tmp_path, grace=5, farewell=0.0, announce_limit=90.0, tell=told.append, clock=clock
    )

    def tick():
        if lives.stat().st_size == 1:
            clock.ahead = 91.0

    assert supervisor.run(tick, interval=0.01) == Outcome("finished")
    assert told[0].startswith("controller is killed: no address and no sign of its start for 9")
    assert supervisor.restarts == 1 and lives.read_text() == "xx"


def test_a_start_without_a_sign_ends_the_run_by_the_name_of_its_limit(tmp_path):
    clock = Clock()
    roles = [role("controller", FOREVER, announces=True), role("trainer", FOREVER)]
    supervisor = Supervisor(
        roles, ["trainer"], tmp_path, grace=5, announce_limit=90.0, tell=lambda _: None, clock=clock
    )  # fmt: skip

    def tick():
        clock.ahead = 91.0

    outcome = supervisor.run(tick, interval=0.01)
    assert outcome.role == "controller" and "launch.announce_limit" in outcome.reason
    assert "out of memory" not in outcome.reason


def test_a_start_that_takes_long_and_gets_on_is_waited_for(tmp_path):
    """As one that reads large data, or waits for a disk that is full."""
    clock, told, signs, done = Clock(), [], 0, tmp_path / "done"
    roles = [role("controller", FOREVER, announces=True), role("trainer", UNTIL, done)]
    supervisor = Supervisor(
        roles, ["trainer"], tmp_path, grace=5, farewell=0.0, announce_limit=90.0, tell=told.append, clock=clock
    )

    def tick():
        nonlocal signs
        signs += 1
        if signs > 5:
            return done.touch()
        still_starting(tmp_path, "controller")
        assert supervisor._look() is None
        clock.ahead += 80.0

    assert supervisor.run(tick, interval=0.05).status == "finished" and not supervisor.restarts
    assert not any("no sign" in line for line in told)
    forget_endpoints(tmp_path)
    assert not list((tmp_path / "endpoints").iterdir())


def test_a_server_that_has_announced_its_address_may_live_for_as_long_as_it_likes(tmp_path):
    lives, done, clock, told = tmp_path / "lives", tmp_path / "done", Clock(), []
    lives.write_text("x")
    polls = []
    roles = [role("controller", LATE, lives, tmp_path, done, announces=True), role("trainer", FOREVER)]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, grace=5, announce_limit=90.0, tell=told.append, clock=clock)

    def tick():
        polls.append(done.exists())
        if len(polls) > 2 and polls[-2]:
            clock.ahead += 1000.0
        if polls.count(True) > 5:
            os.kill(os.getpid(), signal.SIGINT)

    assert supervisor.run(tick, interval=0.01).status == "stopped" and told == []


def test_an_end_takes_no_longer_than_the_grace_period_though_trainer_and_controller_hang(tmp_path):
    """The clock goes on by a fixed amount with every question, so that its reading says how long was waited."""

    class Ticking(Clock):
        def __call__(self):
            self.ahead += 0.5
            return self.ahead

    clock, told, marks = Ticking(), [], []
    roles = [role(name, STUBBORN) for name in ("trainer", "controller", "rollout-0")]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, grace=20.0, tell=told.append, clock=clock)

    def tick():
        if not marks and all((tmp_path / "logs" / f"{r.name}.log").read_text() for r in roles):
            marks.append(clock.ahead)
            os.kill(os.getpid(), signal.SIGINT)

    assert supervisor.run(tick, interval=0.01).status == "stopped"
    assert len(told) == 3 and told[0].startswith("trainer did not end within")
    assert clock.ahead - marks[0] <= 20.0 + 6 * 0.5


def test_after_a_finished_run_all_get_a_while_to_leave_by_themselves_and_then_the_grace_period(tmp_path):
    class Ticking(Clock):
        def __call__(self):
            self.ahead += 0.5
            return self.ahead

    clock, told, marks, done = Ticking(), [], [], tmp_path / "done"
    roles = [role("trainer", UNTIL, done), role("controller", STUBBORN)]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, grace=20.0, farewell=10.0, tell=told.append, clock=clock)
    stop = supervisor.stop
    supervisor.stop = lambda outcome: (marks.append(clock.ahead), stop(outcome))

    def tick():
        if (tmp_path / "logs" / "controller.log").read_text():
            done.touch()

    assert supervisor.run(tick, interval=0.01).status == "finished"
    assert len(told) == 1 and told[0].startswith("controller did not end within")
    assert 30.0 <= clock.ahead - marks[0] <= 30.0 + 6 * 0.5


# A role as vLLM is: its child shares a named semaphore, which Python's cleaner removes when both have ended.
SEMAPHORE = """
import multiprocessing, os, signal, sys
from multiprocessing import resource_tracker
lock = multiprocessing.get_context("spawn").Lock()
with open(sys.argv[1] + ".new", "w") as file:
    file.write("/dev/shm/sem." + lock._semlock.name[1:])
os.rename(sys.argv[1] + ".new", sys.argv[1])
if sys.argv[2] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="named semaphores are elsewhere")
@pytest.mark.parametrize("end", ["dies", "hangs"])
def test_no_named_semaphore_of_a_killed_process_stays(tmp_path, end):
    named, seen = tmp_path / "named", []

    def tick():
        if named.exists() and not seen:
            seen.append(Path(named.read_text()))
            if end == "hangs":
                assert seen[0].exists()
                pid = supervisor.pid("rollout-0")
                report_silence(tmp_path, "rollout-0", Silence(socket.gethostname(), pid, 61.0, "generating"))

    roles = [role("trainer", FOREVER), role("rollout-0", SEMAPHORE, named, end, restarts=0, peers="rollout")]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, grace=5, tell=lambda _: None)
    assert supervisor.run(tick, interval=0.01).role == "rollout-0"
    assert seen or named.exists()
    assert not Path(named.read_text()).exists()


def test_a_process_that_cannot_be_killed_is_not_waited_for_for_ever(monkeypatch):
    """Nor may it be ours: it sits beside a cleaner, in a call that does not return."""
    sent, seconds = [], iter(range(1000))
    monkeypatch.setattr(guardian, "members", lambda group: [11, 12])
    monkeypatch.setattr(guardian, "_command", lambda pid: guardian.CLEANER if pid == 11 else b"python")
    monkeypatch.setattr(guardian.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(guardian.time, "sleep", lambda _: next(seconds))
    monkeypatch.setattr(guardian, "send", lambda group, number: sent.append((group, number)))

    def kill(pid, number):
        assert pid == 12
        raise PermissionError

    monkeypatch.setattr(guardian.os, "kill", kill)
    guardian.end_groups([10], 0.0)
    assert sent == [(10, signal.SIGKILL)] and next(seconds) < 20


class Unkillable:
    """A process that has been sent SIGKILL and is there still."""

    pid, returncode = 10, None

    def poll(self):
        return self.returncode

    def wait(self, timeout):
        if self.returncode is None:
            raise subprocess.TimeoutExpired("x", timeout)


def test_a_process_group_is_killed_once_and_not_when_its_number_may_be_anothers(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(supervisor_module, "end_groups", lambda groups, grace: killed.extend(groups))
    supervisor = Supervisor([role("rollout-0", FOREVER)], [], tmp_path)
    (process,) = supervisor._processes.values()
    process.popen = Unkillable()
    for _ in range(2):
        supervisor._sweep(process)
    assert killed == [10, 10]  # it is ours still
    process.popen.returncode = -9
    for _ in range(2):
        supervisor._sweep(process)
    supervisor._kill_all()
    assert killed == [10, 10, 10]


LEAVES_ONCE = """
import signal, sys
file = open(sys.argv[1], 'a+'); file.write('x'); file.flush(); file.seek(0)
if len(file.read()) > 1: signal.pause()
"""
# Dies in its last moments, when the other has left; its second life ends when the other is back.
LAST_MOMENT = """
import os, sys, time
lives, other = sys.argv[1:]
file = open(lives, 'a+'); file.write('x'); file.flush(); file.seek(0)
life = len(file.read())
while not os.path.exists(other) or os.path.getsize(other) < life:
    time.sleep(0.01)
sys.exit(2 - life and 1)
"""


@pytest.mark.parametrize("first", ["trainer", "controller"])  # whose end is noticed first
def test_a_trainer_that_dies_when_the_others_have_left_gets_them_back_at_once(tmp_path, first, monkeypatch):
    monkeypatch.setattr(supervisor_module, "HURRIED_SECONDS", 1e6)
    other, told = tmp_path / "other", []
    leaves = role("controller", LEAVES_ONCE, other, restarts=1)
    trainer = role("trainer", LAST_MOMENT, tmp_path / "lives", other, restarts=1)
    roles = [trainer, leaves] if first == "trainer" else [leaves, trainer]

    class Hurried(Clock):
        """Once both are back, no time is left to wait for anybody."""

        def __call__(self):
            self.ahead += 1e6 * (other.exists() and other.stat().st_size > 1)
            return super().__call__()

    options = {"grace": 5, "farewell": 1e6, "tell": told.append, "clock": Hurried()}
    supervisor = Supervisor(roles, ["trainer"], tmp_path, **options)

    def tick():
        """Looks when both have ended."""
        for each in roles if not told else ():
            os.waitid(os.P_PID, supervisor.pid(each.name), os.WEXITED | os.WNOWAIT)

    assert supervisor.run(tick, interval=0.01).status == "finished"
    assert sorted(line.partition(";")[0] for line in told[:2]) == [
        "controller ended with exit code 0", "trainer ended with exit code 1",
    ]  # fmt: skip


# Leaves once the trainer lives for the second time; its own second life stays.
LEAVES_LATE = """
import os, signal, sys, time
lives, own = sys.argv[1:]
file = open(own, 'a+'); file.write('x'); file.flush(); file.seek(0)
if len(file.read()) > 1: signal.pause()
while not os.path.exists(lives) or os.path.getsize(lives) < 2:
    time.sleep(0.01)
"""
DIES_ONCE = """
import os, sys, time
lives, condition = sys.argv[1:]
file = open(lives, 'a+'); file.write('x'); file.flush(); file.seek(0)
if len(file.read()) == 1: sys.exit(1)
while not eval(condition): time.sleep(0.01)
"""


def test_a_trainer_started_again_gets_back_who_leaves_while_it_starts(tmp_path):
    """They were told to go by its life before, and it does not end soon."""
    lives, own, told = tmp_path / "lives", tmp_path / "own", []
    lives.touch(), own.touch()

    class Hurried(Clock):
        def __call__(self):
            """A tenth of a second passes with every question once the trainer is back, and an age when all are."""
            self.ahead += 0.1 * (lives.stat().st_size == 2) + 1e6 * (own.stat().st_size == 2)
            return super().__call__()

    controller = role("controller", LEAVES_LATE, lives, own, restarts=1)
    trainer = role("trainer", DIES_ONCE, lives, f"os.path.getsize({str(own)!r}) > 1", restarts=1)
    options = {"grace": 5, "farewell": 1e6, "tell": told.append, "clock": Hurried()}
    supervisor = Supervisor([controller, trainer], ["trainer"], tmp_path, **options)
    assert supervisor.run(interval=0.01).status == "finished"
    assert [line.partition(";")[0] for line in told[:2]] == [
        "trainer ended with exit code 1", "controller ended with exit code 0",
    ]  # fmt: skip


def test_who_leaves_with_a_trainer_that_was_started_again_is_not_started_again(tmp_path):
    lives, own, told = tmp_path / "lives", tmp_path / "own", []
    controller = role("controller", LEAVES_LATE, lives, own, restarts=1)
    go, looks = tmp_path / "go", []
    trainer = role("trainer", DIES_ONCE, lives, f"os.path.exists({str(go)!r})", restarts=1)
    supervisor = Supervisor([controller, trainer], ["trainer"], tmp_path, grace=5, farewell=60.0, tell=told.append)

    def tick():
        if told and supervisor._processes["controller"].left_at is not None:
            looks.append(1)
        if len(looks) > 3:
            go.touch()

    assert supervisor.run(tick, interval=0.01).status == "finished"
    assert [line.partition(";")[0] for line in told] == ["trainer ended with exit code 1"]


def test_the_wait_for_the_trainer_of_one_that_left_too_early_does_not_count_as_life(tmp_path):
    clock = Clock()
    roles = [role("trainer", FOREVER), role("rewards-0", "pass", restarts=2, peers="rewards")]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, grace=5, farewell=61.0, tell=lambda _: None, clock=clock)

    def tick():
        if supervisor._processes["rewards-0"].left_at is not None:
            clock.ahead += 61.0
        if supervisor.restarts > 2:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = supervisor.run(tick, interval=0.01)
    assert outcome == Outcome("failed", "rewards-0 ended with exit code 0, 3 times in a row", "rewards-0")


# Each life makes the steps up to a version and dies.
DIES_AT = """
import json, sys
workdir, versions = sys.argv[1], sys.argv[2:]
file = open(workdir + '/lives', 'a+'); file.write('x'); file.seek(0)
with open(workdir + '/trained.jsonl', 'a') as steps:
    version = int(versions[len(file.read()) - 1])
    steps.write(json.dumps({'version': version, 'groups': []}) + chr(10))
sys.exit(9)
"""


@pytest.mark.parametrize(
    ("versions", "lives"), [((3, 3, 4), 2), ((3, 4, 4, 5), 3), ((3, 4, 5, 5), 4), ((3, 4, 2, 9), 3)]
)  # fmt: skip
def test_a_trainer_that_dies_at_the_same_step_is_not_started_for_ever_however_long_it_takes(tmp_path, versions, lives):
    clock = Clock()
    trainer = role("trainer", DIES_AT, tmp_path, *versions, restarts=1)
    supervisor = Supervisor([trainer], ["trainer"], tmp_path, grace=5, tell=lambda _: None, clock=clock)

    def tick():
        os.waitid(os.P_PID, supervisor.pid("trainer"), os.WEXITED | os.WNOWAIT)
        assert len((tmp_path / "lives").read_text()) <= lives
        clock.ahead += 61.0

    assert supervisor.run(tick, interval=0.0).reason == "trainer ended with exit code 9, 2 times in a row"
    assert len((tmp_path / "lives").read_text()) == lives
