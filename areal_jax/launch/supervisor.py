"""Starts the roles of a run as processes, starts again what dies, and ends everything together.

Each role is the leader of its own process group and writes to `WORKDIR/logs/NAME.log`. The run is over when the trainer
ends. Nothing stays behind: the groups are ended with the supervisor, and a guardian process ends them should the
supervisor itself be killed. This module knows processes and signals; what the roles are is decided in `roles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from areal_jax.exits import CANNOT_GO_ON, TOLD_TO_STOP, WRONG_SETTING
from areal_jax.launch import child
from areal_jax.launch.guardian import CLEANER_SECONDS, TIDY_SECONDS, end_groups, send
from areal_jax.metrics.lines import Lines
from areal_jax.metrics.trained import last_trained
from areal_jax.transport.endpoints import endpoint_mark, starting_mark
from areal_jax.transport.silence import take_silence

ROOT = str(Path(__file__).resolve().parents[2])
STABLE_SECONDS = 60.0  # a role that has lived for so long (a leader: and got further) has its restarts forgiven
FINAL = (WRONG_SETTING, CANNOT_GO_ON)  # starting the role again changes nothing
FAREWELL_SECONDS = 60.0  # how far apart the trainer and the others may end by themselves
HURRIED_SECONDS = 10.0  # the same for a leader that was started again not long before
LAST_SHARE = 0.2  # of the grace period, for those that are told to end after the leaders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """One process of a run."""

    name: str  # "rollout-0": also the name of its log
    command: tuple[str, ...]
    env: dict[str, str]  # the whole environment
    restarts: int = 0  # times that it may die in a row
    nice: int = 0
    peers: str = ""  # roles with the same word stand in for one another: one of them may be given up
    announces: bool = False  # it is a server, and must announce its address


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: status is "finished", "stopped" (by a signal) or "failed"."""

    status: str
    reason: str = ""
    role: str = ""  # the role that failed

    @property
    def exit_code(self) -> int:
        return {"finished": 0, "stopped": 130}.get(self.status, 1)  # 130: as after Ctrl-C


class _Process:
    """A role and its present process."""

    def __init__(self, role: Role):
        self.role = role
        self.popen: subprocess.Popen | None = None
        self.started = 0.0
        self.before: object = None  # its endpoint's mark when it was started
        self.announced = not role.announces
        self.sign: object = None  # its last one of getting on with its start
        self.heard = 0.0  # when that came
        self.silent = 0.0  # the seconds of its life that it hung
        self.fault = ""  # why it was killed by us
        self.deaths = 0
        self.reached = -1  # the furthest step at a death of it
        self.given_up = False
        self.swept = False  # nothing is left of its group, whose number may be another's by now
        self.left_at: float | None = None  # when it was first seen to have ended well


class Supervisor:
    """Runs `roles`; those named in `leaders` decide: when all leaders have ended well, the run is finished. `grace`
    is what all get together to end when told to, `farewell` what lies between the ends of roles that go by themselves.
    A server that neither announces its address nor says for `announce_limit` seconds that it is `still_starting` hangs.

    Without leaders, as on a node of a cluster that only generates, all roles together decide.

    `tell(text)` gets one line per event (a restart, the reason of an end). `lock` is the descriptor of a locked file
    that stays locked until nothing of the run is left, whatever becomes of this process; without it the run's folder is
    another's to tidy. What is started again is noted in the file `record` in `workdir`.
    """

    def __init__(
        self, roles: Sequence[Role], leaders: Sequence[str], workdir: str | os.PathLike, *, grace: float = 60.0,
        farewell: float = FAREWELL_SECONDS, announce_limit: float = float("inf"), guardian_restarts: int = 5,
        tell: Callable[[str], None] = print, lock: int | None = None, clock: Callable[[], float] = time.monotonic,
        record: str = "restarts.jsonl",
    ):  # fmt: skip
        self._processes = {role.name: _Process(role) for role in roles}
        self._leaders = list(leaders)
        self._workdir, self._logs = Path(workdir).resolve(), Path(workdir) / "logs"
        self._grace, self._farewell, self._tell, self._lock = grace, farewell, tell, lock
        self._announce_limit, self._clock = announce_limit, clock
        self._record = Lines(self._workdir / record)
        self._guardian: subprocess.Popen | None = None
        self._guardian_restarts, self._unguarded = guardian_restarts, 0  # the second: its deaths in a row
        self._guarded_at = 0.0  # when it was started, or is to be
        self._signals = 0
        self.restarts = 0

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, tick: Callable[[], None] = lambda: None, interval: float = 0.2) -> Outcome:
        """Start everything and stay until the end; `tick()` is called every `interval` seconds (the live view).

        SIGINT and SIGTERM end the run in order: the leaders first, so that they can save. A second
        SIGINT kills at once.
        """
        previous = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            self.start()
            while (outcome := self._look()) is None:
                tick()
                time.sleep(interval)
            self.stop(outcome)
            return outcome
        finally:
            self._kill_all()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._guard()
        for process in self._processes.values():
            self._spawn(process)

    def pid(self, name: str) -> int:
        """The process id of role `name` (also its group's)."""
        return self._processes[name].popen.pid

    def _look(self) -> Outcome | None:
        """Notice what ended since the last look, start it again where that is allowed; the outcome when it is over."""
        if self._signals:
            return Outcome("stopped", "told to stop")
        self._mind_guardian()
        deciding = [self._processes[name] for name in self._leaders] or list(self._processes.values())
        if all(process.popen.poll() == 0 for process in deciding if not process.given_up):
            return Outcome("finished")
        for process in self._processes.values():
            if process.given_up or process.popen is None:
                continue
            if (code := process.popen.poll()) is None:
                self._end_if_silent(process)
                self._end_if_unannounced(process)
                continue
            if code == 0 and (process.role.name in self._leaders or self._may_leave(process)):
                continue
            if process.role.name in self._leaders and code == TOLD_TO_STOP:
                return Outcome("stopped", f"{process.role.name} was told to stop")
            if (failure := self._after_death(process, code)) is not None:
                return failure
        return None

    def _mind_guardian(self) -> None:
        """Start another for one that died; one that dies at once, after a pause that grows, and not for ever."""
        now = self._clock()
        if self._guardian is not None and self._guardian.poll() is not None:
            how = describe_exit(self._guardian.returncode)
            self._guardian.stdin.close()
            self._guardian = None
            self._unguarded = 1 if now - self._guarded_at > STABLE_SECONDS else self._unguarded + 1
            if self._unguarded > self._guardian_restarts:
                self._guarded_at = float("inf")
                more = "going on without one: who kills this launcher has to end its processes, too"
                self._tell(f"the guardian {how}, {self._unguarded} times in a row; {more}")
                return
            self._tell(f"the guardian {how}; starting another")
            self._record.add({"time": time.time(), "role": "guardian", "how": how})
            self._guarded_at = now + min(2.0 ** (self._unguarded - 2), 30.0) * (self._unguarded > 1)
        if self._guardian is None and now >= self._guarded_at:
            self._guard()

    def _end_if_silent(self, process: _Process) -> None:
        """A role that hangs does not end by itself; once it is killed, it is replaced as any that died."""
        if (silence := take_silence(self._workdir, process.role.name)) is None:
            return
        same = (silence.host, silence.pid) == (socket.gethostname(), process.popen.pid)
        if same or (not silence.pid and self._clock() - process.started > silence.seconds):
            heard = f"{silence.by} has heard nothing from it for {silence.seconds:.0f} s (it was {silence.phase})"
            self._replace(process, silence.seconds, heard)

    def _end_if_unannounced(self, process: _Process) -> None:
        """A server that nobody can find hangs as well, and nobody else can know which process it is."""
        if process.announced:
            return
        name, now = process.role.name, self._clock()
        process.announced = endpoint_mark(self._workdir, name) != process.before
        if (sign := starting_mark(self._workdir, name)) != process.sign:
            process.sign, process.heard = sign, now
        if not process.announced and now - process.heard > self._announce_limit:
            process.announced = True
            fault = f"no address and no sign of its start for {now - process.heard:.0f} s (launch.announce_limit)"
            self._replace(process, now - process.started, fault)

    def _replace(self, process: _Process, silent: float, fault: str) -> None:
        """Kill a role that hangs; what follows is what follows any death."""
        process.silent, process.fault = silent, fault
        self._tell(f"{process.role.name} is killed: {fault}")
        self._sweep(process)

    def _may_leave(self, process: _Process) -> bool:
        """At the end of a run, the others are told to go and may be gone shortly before the trainer; but one that died
        in its last moments and was started again needs them once more."""
        if process.left_at is None:
            process.left_at = self._clock()
        restarted = [p.started for p in map(self._processes.get, self._leaders) if p.deaths]
        if any(started >= process.left_at for started in restarted):
            return False
        hurry = any(process.left_at - started < self._farewell for started in restarted)
        patience = min(self._farewell, HURRIED_SECONDS) if hurry else self._farewell
        return self._clock() - process.left_at < patience

    def _after_death(self, process: _Process, code: int) -> Outcome | None:
        role = process.role
        self._sweep(process)
        ended = self._clock() if process.left_at is None else process.left_at
        if self._got_further(process) and ended - process.started - process.silent > STABLE_SECONDS:
            process.deaths = 0
        process.deaths += 1
        how = f"was killed by the launcher: {process.fault}" if process.fault else describe_exit(code)
        if process.deaths <= role.restarts and code not in FINAL:
            self._tell(f"{role.name} {how}; starting it again ({process.deaths} of {role.restarts})")
            self.restarts += 1
            self._record.add({"time": time.time(), "role": role.name, "how": how})
            if role.name in self._leaders:
                self._note_who_has_left()
            self._spawn(process)
            return None
        others = [p for p in self._processes.values() if role.peers and p.role.peers == role.peers and not p.given_up]
        if len(others) > 1 and code not in FINAL:
            process.given_up = True
            left = len(others) - 1
            self._tell(f"{role.name} {how} {process.deaths} times in a row and is given up; others go on: {left}")
            return None
        again = f", {process.deaths} times in a row" if process.deaths > 1 else ""
        return Outcome("failed", f"{role.name} {how}{again}", role.name)

    def _note_who_has_left(self) -> None:
        """Before a leader is started again: who has left by now was told to go by its life before."""
        for process in self._processes.values():
            if process.left_at is None and process.popen is not None and process.popen.poll() == 0:
                process.left_at = self._clock()

    def _got_further(self, process: _Process) -> bool:
        """A trainer that takes a minute to load and compile may die of the same batch every time."""
        if process.role.name not in self._leaders:
            return True
        before, process.reached = process.reached, max(process.reached, last_trained(self._workdir))
        return process.reached > before

    # -- the end ---------------------------------------------------------------------------------------------------

    def stop(self, outcome: Outcome) -> None:
        """End all roles: let them leave by themselves after a finished run, else tell leaders, then the others.

        All of it takes no longer than the grace period, of which the leaders may use all but a last part. Without the
        controller they cannot save: where that has given up, there is only the last part, for all.
        """
        if outcome.status == "finished":
            self._wait(self._alive(), self._clock() + self._farewell)
        saves = outcome.role != "controller"
        deadline = self._clock() + (self._grace if saves else LAST_SHARE * self._grace)
        if outcome.status != "finished" and saves:
            leaders = [p for p in self._alive() if p.role.name in self._leaders]
            self._end(leaders, deadline - LAST_SHARE * self._grace)
        self._end(self._alive(), deadline)

    def _end(self, processes: list[_Process], deadline: float) -> None:
        began = self._clock()
        for process in processes:
            send(process.popen.pid, signal.SIGTERM)
        self._wait(processes, deadline)
        for process in processes:
            if process.popen.poll() is None:
                self._tell(f"{process.role.name} did not end within {self._clock() - began:.0f} s and is killed")
                self._sweep(process)

    def _wait(self, processes: list[_Process], deadline: float) -> None:
        signals = self._signals
        while any(p.popen.poll() is None for p in processes) and self._clock() < deadline:
            if self._signals > max(signals, 1):
                return  # told a second time: do not wait
            time.sleep(0.05)

    def _alive(self) -> list[_Process]:
        return [p for p in self._processes.values() if p.popen is not None and p.popen.poll() is None]

    def _kill_all(self) -> None:
        for process in self._processes.values():
            if process.popen is not None:
                self._sweep(process)
        if self._guardian is not None:
            self._guardian.stdin.close()  # with nothing left to guard, it ends at once
            if not _ends(self._guardian, self._grace + TIDY_SECONDS):
                self._tell(f"the guardian did not end within {self._grace + TIDY_SECONDS:.0f} s and is killed")
                self._guardian.kill()
                _ends(self._guardian, CLEANER_SECONDS)
            self._guardian = None

    def _sweep(self, process: _Process) -> None:
        """Kill what is left of a role's process group, and reap the role; a process that cannot be killed stays."""
        if process.swept:
            return
        end_groups([process.popen.pid], 0.0)
        if _ends(process.popen, CLEANER_SECONDS):
            process.swept = True
            self._note(f"-{process.popen.pid}")

    # -- processes -------------------------------------------------------------------------------------------------

    def _spawn(self, process: _Process) -> None:
        role = process.role
        if role.announces:
            process.before, process.announced = endpoint_mark(self._workdir, role.name), False
            process.sign = starting_mark(self._workdir, role.name)
        with open(self._logs / f"{role.name}.log", "ab") as log:
            prepare = (sys.executable, "-S", child.__file__, str(os.getpid()), str(role.nice))
            process.popen = subprocess.Popen(
                (*prepare, *role.command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=role.env, process_group=0,
            )  # fmt: skip
        process.started = process.heard = self._clock()
        process.silent, process.fault, process.left_at, process.swept = 0.0, "", None, False
        self._note(f"+{process.popen.pid}")

    def _guard(self) -> None:
        """Start a guardian and tell it what runs."""
        guard = [sys.executable, "-m", "areal_jax.launch.guardian", str(self._grace), str(self._workdir)]
        self._guarded_at = self._clock()
        held = () if self._lock is None else (self._lock,)
        self._guardian = subprocess.Popen(
            (*guard, *map(str, held)), stdin=subprocess.PIPE, bufsize=0, process_group=0, env=own_env(), pass_fds=held
        )
        for process in self._processes.values():
            if process.popen is not None and not process.swept:
                self._note(f"+{process.popen.pid}")

    def _note(self, line: str) -> None:
        if self._guardian is not None:
            with contextlib.suppress(OSError):  # it is dead, and another will be told of all that runs
                self._guardian.stdin.write(f"{line}\n".encode())

    def _on_signal(self, number: int, _) -> None:
        # Schedulers send SIGTERM more than once; only a second Ctrl-C is impatience.
        self._signals += number == signal.SIGINT or not self._signals


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    """Whether `process` ends within so long; then it is reaped."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def describe_exit(code: int) -> str:
    """What an exit code says, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory? see the kernel's log)" if name == "SIGKILL" else "")


def own_env() -> dict[str, str]:
    """This process's environment, and the place of `areal_jax`."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": ROOT + (os.pathsep + path if path else "")}
