"""Faults that come from outside the roles, at moments of their own: random deaths, bad networks, taken ports, ..."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from areal_jax.transport import messages as m
from areal_jax.transport.endpoints import read_endpoint, split_address, write_endpoint
from areal_jax.transport.errors import TransportError
from areal_jax.transport.sockets import SyncClient
from tools.faults.harness import CONT, KILL, STOP, Run
from tools.faults.points import fill


def at_random(role: str) -> Callable[[Run], None]:
    """A process of `role` is killed at a moment that the seed draws."""

    def story(run: Run) -> None:
        run.random_moment()
        run.until(lambda: run.strike(role, KILL), 30.0)

    return story


def guardian_dies(then_launcher: bool) -> Callable[[Run], None]:
    """The launcher's guardian is killed at a random moment and must be replaced; then the launcher is, if asked."""

    def story(run: Run) -> None:
        run.random_moment()
        run.until(lambda: run.strike("guardian", KILL), 30.0)
        run.struck = run.until(lambda: run.started_again().get("guardian") and run.find("guardian"), 30.0)
        if then_launcher and run.struck:
            run.launcher.kill()

    return story


def frozen(role: str, seconds: float) -> Callable[[Run], None]:
    """A process of `role` is stopped at a random moment, and goes on `seconds` later as if nothing had been."""

    def story(run: Run) -> None:
        run.random_moment()
        found = []
        run.until(lambda: found.extend(run.find(role)) or found, 30.0)
        run.struck = bool(found)
        signal_all(found, STOP)
        wake = time.monotonic() + seconds
        run.until(lambda: time.monotonic() > wake)
        signal_all(found, CONT)

    return story


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


# --- The network ---------------------------------------------------------------------------------------------------


GREETINGS = 128  # bytes with which the two ends of a connection begin, before any message


class Wire:
    """A TCP forwarder that the endpoint file of `server` is made to name; it can lose, hold up, or cut what passes."""

    def __init__(self, run: Run, server: str):
        self._target = read_endpoint(run.workdir, server)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.open, self.losing = True, False
        self.made = 0  # connections
        self.lost = self.held = 0  # bytes
        self._clear = threading.Event()
        self._clear.set()
        threading.Thread(target=self._accept, daemon=True).start()
        write_endpoint(run.workdir, server, f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")

    def _accept(self) -> None:
        host, port = split_address(self._target)
        with contextlib.suppress(OSError):
            while self.open:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection((host, int(port)))
                except OSError:
                    client.close()
                    continue
                self._pairs.append((client, server))
                self.made += 1
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.held += 0 if self._clear.is_set() else len(data)
                self._clear.wait()
                if self.losing:
                    self.lost += len(data)
                else:
                    sink.sendall(data)
        self._shut(source, sink)

    def _shut(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def lose(self) -> None:
        """Throw away what is under way, and what comes until `cut`."""
        self.losing = True

    def hold(self) -> None:
        self._clear.clear()

    def release(self) -> None:
        self._clear.set()

    def cut(self) -> None:
        """End all connections; new ones may be made."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self._shut(*pair)
        self.losing = False

    def close(self) -> None:
        self.open = False
        self.release()
        self._listener.close()
        self.cut()


def bad_network(server: str, how: str) -> Callable[[Run], None]:
    """Everything between `server` and its clients goes over a wire that fails again and again, once somebody uses it.

    "dropped": what passes is lost for a while, then the connections break. "delayed": nothing arrives for some seconds.
    """

    def story(run: Run) -> None:
        if not run.until(lambda: read_endpoint(run.workdir, server)):
            return
        wire = Wire(run, server)

        def pause(low: float, high: float) -> bool:
            end = time.monotonic() + run.random.uniform(low, high)
            run.until(lambda: time.monotonic() > end)
            return run.launcher.poll() is None

        try:
            times = 0
            run.until(lambda: wire.made)
            while pause(0.2, 2.0) and times < 16:
                times += 1
                if how == "dropped":
                    wire.lose()
                    pause(0.1, 1.0)
                    wire.cut()
                else:
                    wire.hold()
                    pause(1.0, 4.0)
                    wire.release()
            done, much = ("lost", wire.lost) if how == "dropped" else ("held", wire.held)
            run.where, run.struck = f"{times} times, {much} bytes {done}", much > GREETINGS
            run.wait()
        finally:
            wire.close()

    return story


# --- Ports ---------------------------------------------------------------------------------------------------------

_taken: list[socket.socket] = []  # held to the end of this process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def taken_port() -> int:
    """A port that this process listens on."""
    _taken.append(socket.create_server(("127.0.0.1", 0)))
    return _taken[-1].getsockname()[1]


def nothing(run: Run) -> None:
    """The fault is in the settings."""
    run.struck = True


def failed(error: str) -> Callable[[Run], None]:
    """The fault is in the settings, and has come about if samples failed by this error."""

    def story(run: Run) -> None:
        run.wait()
        with contextlib.suppress(OSError):
            times = json.loads((run.workdir / "summary.json").read_text())["failed"].get(error, 0)
            run.where, run.struck = f"{times} times", times > 0

    return story


def port_is_gone(run: Run) -> None:
    """The controller dies, and before it is back somebody else listens on its port: it must take another."""
    run.random_moment()
    run.until(lambda: read_endpoint(run.workdir, "controller"))
    old = read_endpoint(run.workdir, "controller")
    if not run.strike("controller", KILL):
        return
    run.struck = False
    host, port = split_address(old)

    def grab() -> bool:
        with contextlib.suppress(OSError):
            _taken.append(socket.create_server((host, int(port))))
            return True
        return False

    run.struck = run.until(grab, 10.0) and run.until(lambda: read_endpoint(run.workdir, "controller") != old, 60.0)


# --- Workers come and go -------------------------------------------------------------------------------------------


def comes_and_goes(ending: int) -> Callable[[Run], None]:
    """Somebody starts one more rollout worker by hand while the run goes on, and ends it by this signal at work."""

    def story(run: Run) -> None:
        run.until(lambda: run.steps() >= 1)
        command = [sys.executable, "-m", "areal_jax.rollout", "--workdir", str(run.workdir), "--index", "7"]
        guest = run.start(command, run.workdir / "logs" / "rollout-7.log")
        try:
            run.struck = run.until(lambda: busy(run, "rollout-7"))
            guest.send_signal(ending)
        finally:
            try:
                guest.wait(60)
            except subprocess.TimeoutExpired:
                guest.kill()
                run.wrong.append("the guest did not end within 60 s")

    return story


def busy(run: Run, worker: str) -> bool:
    """Whether `worker` has samples to run right now, as the controller sees it."""
    return status(run).get("roles", {}).get(worker, {}).get("running", 0) > 0


def status(run: Run) -> dict[str, Any]:
    """The controller's; empty where it does not answer."""
    with contextlib.suppress(TransportError), SyncClient("onlooker", run.workdir) as client:
        return client.request(m.GetStatus(), 2.0).data
    return {}


# --- The disk ------------------------------------------------------------------------------------------------------


def full_disk(seconds: float | None) -> Callable[[Run], None]:
    """Somebody fills the run's disk to the last byte, and makes room `seconds` after it was noticed; None: does not."""

    def story(run: Run) -> None:
        run.until(lambda: run.steps() >= 2)
        fill(run.ballast)
        run.struck = run.until(lambda: noticed(run), 60.0)
        if seconds is not None:
            make_room(run, seconds)

    return story


def room_again(seconds: float, said: str) -> Callable[[Run], None]:
    """A trainer fills the run's disk at a point of its own, and somebody makes room `seconds` after the controller has
    noticed it and one of the trainer's processes `said` so in its log (a pattern)."""

    def story(run: Run) -> None:
        def told() -> bool:
            logs = (run.workdir / "logs").glob("trainer-*.log")
            return any(re.search(said, log.read_text(errors="replace")) for log in logs)

        run.until(run.fired.exists)
        run.struck = run.until(lambda: noticed(run) and told(), 60.0)
        make_room(run, seconds)

    return story


def noticed(run: Run) -> bool:
    """Whether the controller says that the disk takes nothing more."""
    return "cannot be written" in status(run).get("disk", "")


def make_room(run: Run, seconds: float) -> None:
    """After so long."""
    wake = time.monotonic() + seconds
    run.until(lambda: time.monotonic() > wake)
    run.ballast.unlink(missing_ok=True)


# --- Verifiers of this package's runs ------------------------------------------------------------------------------


def unhurried(completion: str, answer: str) -> float:
    """For runs that must last until a guest has come."""
    time.sleep(0.5)
    return float(answer in completion)


def slow(completion: str, answer: str) -> float:
    """Some tenths of a second for each answer, and more than any limit for some."""
    time.sleep(random.choice([0.2] * 24 + [60.0]))
    return float(answer in completion)



