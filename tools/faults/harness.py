"""One tiny run with one fault, and what must be true after it. Used by `tools/fault_injection.py` and `tests/faults`.

    outcome = run(Fault(...), folder, seed=0)

A fault strikes at a point of a role's code (`points`), at a moment that the seed draws, or it is a story of its own
(`stories`). The run is the real thing: the launcher's own session and supervisor, all roles as processes, encrypted
sockets. Everything that it is judged by, it leaves itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from areal_jax.launch.logs import log_tail
from areal_jax.metrics.trained import read_trained
from tools import judge
from tools.faults import launcher
from tools.faults.points import POINTS

LIMIT = 300.0  # seconds for one life of the launcher
GONE = 45.0  # seconds in which everything must be gone after the launcher
KILL, STOP, CONT = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
STEPS = -(-launcher.PROMPTS // launcher.TINY["controller.batch_size"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of thing that goes wrong.

    `point` (of `points.POINTS`) says where; `story`, a function of the `Run`, does it from outside while the run goes
    on, or what follows upon the point; it says whether the fault came about. `launcher_dies`: the same command must
    finish the run; `quarantined`: how many prompts must be put away.
    """

    role: str
    action: str
    point: str = ""
    visit: int = 1
    seconds: float = 0.0
    story: Callable[[Run], None] | None = None
    what: str = ""  # in words: a story, or more about the point
    settings: dict = dataclasses.field(default_factory=dict)
    launcher_dies: bool = False
    fails: str = ""  # the run must not finish: it ends with these words
    ends: str = ""  # the first life of the run ends with these words; the same command must finish it
    quarantined: int = 0
    restarts: int | None = 1  # times that the role is started again, and no other; None: as it comes
    disk: int = 0  # bytes of a file system of the run's own; 0: it has none
    logs_apart: bool = False  # the logs are not on it, as they must tell of the fault
    random: bool = False  # the seed matters

    @property
    def name(self) -> str:
        return f"{self.action}: {', '.join(filter(None, (self.point or self.role, self.what)))}"


@dataclasses.dataclass
class Outcome:
    """What came of it; `problems` is empty when all is as it must be."""

    fault: str
    role: str
    seed: int
    seconds: float
    problems: list[str]
    struck: bool  # the fault did come about
    started_again: dict[str, int]  # by role
    steps_again: int  # training steps that were made again after going back to a checkpoint
    where: str  # the moment of a random fault
    code: str = ""  # what was tried: the commit


class Run(judge.Watched):
    """A run that goes on in `folder`, seen from outside."""

    def __init__(self, fault: Fault, folder: Path, seed: int):
        super().__init__(folder / "run", folder / "tmp")
        self.fault, self.folder = fault, folder
        self.random = random.Random(f"{fault.role}/{fault.action}/{seed}")
        self.where, self.struck, self.hung = "", False, False
        self.wrong: list[str] = []  # what a story found out
        self.fired, self.ballast = folder / "fired", self.workdir / "ballast"
        self.compile_cache = ""

    # -- the launcher -----------------------------------------------------------------------------------------------

    def begin(self, compile_cache: str) -> None:
        """Start the launcher."""
        f, self.compile_cache, self.hung = self.fault, compile_cache, False
        spec = {"point": f.point, "action": f.action, "visit": f.visit, "seconds": f.seconds, "fired": str(self.fired)}
        spec["ballast"] = str(self.ballast)
        plan = {
            "workdir": str(self.workdir), "settings": f.settings | {"launch.compile_cache": compile_cache},
            "role": f.point and POINTS[f.point].role, "fault": spec,
            "logs": str(self.folder / "logs") if f.logs_apart else "",
        }  # fmt: skip
        command = [sys.executable, "-m", "tools.faults.launcher", json.dumps(plan)]
        self.launcher = self.start(command, self.folder / "launcher.log")

    def wait(self) -> int | None:
        """The launcher's exit code; None when it had to be killed because it did not end."""
        try:
            self.launcher.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.hung = True
            self.launcher.kill()
            self.launcher.wait()
        return None if self.hung else self.launcher.returncode

    def log(self) -> str:
        path = self.folder / "launcher.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def started_again(self) -> dict[str, int]:
        """How often each role was, by the supervisors' own record."""
        roles = [row["role"] for row in judge.lines(self.workdir / "restarts.jsonl")]
        return {role: roles.count(role) for role in sorted(set(roles))}

    def until(self, condition: Callable[[], object], seconds: float = 120.0) -> bool:
        """Wait for `condition`; False when the launcher ended first, or after so long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def steps(self) -> int:
        """Training steps made so far."""
        return len(read_trained(self.workdir))

    # -- faults from outside ----------------------------------------------------------------------------------------

    def strike(self, role: str, number: int) -> bool:
        """Send a signal to a process of `role`, drawn at random; whether there was one."""
        found = self.find(role)
        if not found:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            self.random.choice(found).send_signal(number)
            self.struck = True
        return self.struck

    def random_moment(self) -> None:
        """Wait for a moment that the seed draws: so many steps made, and some tenths of a second."""
        steps = self.random.randrange(STEPS - 1)
        delay = self.random.uniform(0.0, 0.5 if steps else 8.0)
        self.where = f"after {steps} steps and {delay:.1f} s"
        if self.until(lambda: self.steps() >= steps and (self.workdir / "logs").exists()):
            deadline = time.monotonic() + delay
            self.until(lambda: time.monotonic() > deadline)


def run(fault: Fault, folder: Path, seed: int = 0, compile_cache: str = "") -> Outcome:
    """Run it; `folder` must not exist. The launcher is started again where the fault was its own death."""
    started = time.monotonic()
    run = Run(fault, folder, seed)
    problems = []
    with own_disk(run):
        try:
            run.begin(compile_cache)
            if fault.story is not None:
                fault.story(run)
            code = run.wait()
            run.struck |= fault.story is None and run.fired.exists()
            again = fault.launcher_dies and run.struck and code is not None and code not in (0, 1, 2)
            if fault.ends:
                again = code == 1 and fault.ends in run.log()
                problems += [] if again else [f"exit code {code}, and no {fault.ends!r}: {tail(run)}"]
                run.ballast.unlink(missing_ok=True)
            if again:
                problems += [f"after the first life's end: {p}" for p in left_behind(run)]
                run.begin(compile_cache)
                code = run.wait()
            problems += judged(run, code)
            problems += left_behind(run)
        finally:
            run.kill()
            if problems and fault.disk:
                shutil.copytree(run.workdir, run.folder / "kept", dirs_exist_ok=True)
        written = [row["version"] for row in judge.lines(run.workdir / "trained.jsonl")]
        again = run.started_again()
    return Outcome(
        fault.name, fault.role, seed, time.monotonic() - started, problems, run.struck, again,
        len(written) - len(set(written)), run.where,
    )  # fmt: skip


@contextlib.contextmanager
def own_disk(run: Run) -> Iterator[None]:
    """The run's folder is a small file system of its own, where the fault wants one. Needs the right to mount."""
    if not run.fault.disk:
        yield
        return
    run.workdir.mkdir(mode=0o700)
    options = f"size={run.fault.disk},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "areal_jax", run.workdir], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", run.workdir], check=True)


def may_mount() -> bool:
    """Whether this process may mount a file system."""
    return sys.platform == "linux" and os.geteuid() == 0 and _has_admin()


def _has_admin() -> bool:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> 21 & 1)  # CAP_SYS_ADMIN


# --- What must be true afterwards ----------------------------------------------------------------------------------


def judged(run: Run, code: int | None) -> Iterator[str]:
    """What is wrong with the way the run ended, and with its accounts."""
    fault = run.fault
    yield from run.wrong
    if not run.struck:
        yield "the fault never came about"
    if code is None:
        yield f"the run did not end within {LIMIT:.0f} s"
        return
    if fault.fails:
        if code == 0 or fault.fails not in run.log():
            yield f"exit code {code}, and no {fault.fails!r}: {tail(run)}"
        return
    if code != 0:
        yield f"exit code {code}: {tail(run)}"
        return
    again = run.started_again()
    if fault.restarts is not None and run.struck and not as_expected(again, fault):
        yield f"{again} were started again, expected {fault.role} {fault.restarts} times: {tail(run)}"
    yield from accounts(run.workdir, fault.quarantined)
    yield from judge.secrets(run.workdir)


def as_expected(again: dict[str, int], fault: Fault) -> bool:
    """Whether the struck role alone was started again, as often as it must be.

    A trainer that is struck once the run is over, and the others have left, gets all of them back.
    """
    own = sum(n for name, n in again.items() if name.partition("-")[0] == fault.role)
    others = {name: n for name, n in again.items() if name.partition("-")[0] != fault.role}
    back = {"controller": 1, "rewards-0": 1, "rollout-0": 1}
    return own == fault.restarts and (not others or (fault.role == "trainer" and others == back))


def accounts(workdir: Path, quarantined: int) -> Iterator[str]:
    """Compares what the trainer wrote down with the ledger, with what the controller counted, and with the data set."""
    trained, bound, size = read_trained(workdir), launcher.BOUND, launcher.GROUP
    state = judge.newest_state(workdir)
    yield from judge.ledger_problems(trained, state, steps=len(trained), bound=bound, group_size=size)
    yield from judge.summary_problems(workdir, bound=bound)
    prompts = {"epochs": launcher.EPOCHS, "prompts": launcher.PROMPTS}
    yield from judge.data_problems(workdir, **prompts, quarantined=quarantined)


def left_behind(run: Run) -> list[str]:
    finished = not run.fault.fails and (run.workdir / "summary.json").exists()
    return run.left_behind(GONE, finished=finished)


def tail(run: Run) -> str:
    """The last words of the launcher and of every role, for whoever must find out."""
    logs = {path.stem: log_tail(path, 3) for path in sorted((run.workdir / "logs").glob("*.log"))}
    return f"{log_tail(run.folder / 'launcher.log', 12)}; {logs}"
