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
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from areal_jax.launch.supervisor import log_tail
from areal_jax.metrics.trained import read_trained
from areal_jax.metrics.writers import read_metrics
from areal_jax.weights import store
from tools.faults import launcher
from tools.faults.points import POINTS

ROOT = Path(__file__).parents[2]
MARK = "FAULT_INJECTION_RUN"  # set in the environment of everything that a run starts
LIMIT = 300.0  # seconds for one life of the launcher
GONE = 45.0  # seconds in which everything must be gone after the launcher
KILL, STOP, CONT = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
STEPS = -(-launcher.PROMPTS // launcher.TINY["controller.batch_size"])
MODULES = {
    "controller": "areal_jax.controller", "rollout": "areal_jax.rollout", "rewards": "areal_jax.rewards",
    "trainer": "areal_jax.trainer", "verifier": "areal_jax.rewards.worker",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of thing that goes wrong.

    `point` (of `points.POINTS`) says where; else `story`, a function of the `Run`, does it from outside while the run
    goes on. `launcher_dies`: the same command must finish the run; `quarantined`: how many prompts must be put away.
    """

    role: str
    action: str
    point: str = ""
    visit: int = 1
    seconds: float = 0.0
    story: Callable[[Run], None] | None = None
    what: str = ""  # of a story, in words
    settings: dict = dataclasses.field(default_factory=dict)
    launcher_dies: bool = False
    fails: str = ""  # the run must not finish: it ends with these words
    quarantined: int = 0
    restarts: int | None = 1  # processes started again, at least; None: no matter
    random: bool = False  # the seed matters

    @property
    def name(self) -> str:
        return f"{self.action}: {self.point or f'{self.role}, {self.what}'}"


@dataclasses.dataclass
class Outcome:
    """What came of it; `problems` is empty when all is as it must be."""

    fault: str
    role: str
    seed: int
    seconds: float
    problems: list[str]
    struck: bool  # the fault did come about
    restarts: int
    steps_again: int  # training steps that were made again after going back to a checkpoint
    where: str  # the moment of a random fault


class Run:
    """A run that goes on in `folder`, seen from outside."""

    def __init__(self, fault: Fault, folder: Path, seed: int):
        self.fault, self.folder, self.workdir = fault, folder, folder / "run"
        self.random = random.Random(f"{fault.role}/{fault.action}/{seed}")
        self.mark, self.where, self.struck = uuid.uuid4().hex, "", False
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.fired = folder / "fired"
        self.launcher: subprocess.Popen | None = None
        self.compile_cache = ""

    # -- the launcher -----------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
        own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), MARK: self.mark}
        return kept | own

    def start(self, compile_cache: str) -> None:
        f, self.compile_cache = self.fault, compile_cache
        spec = {"point": f.point, "action": f.action, "visit": f.visit, "seconds": f.seconds, "fired": str(self.fired)}
        plan = {
            "workdir": str(self.workdir), "settings": f.settings | {"launch.compile_cache": compile_cache},
            "role": f.point and POINTS[f.point].role, "fault": spec,
        }  # fmt: skip
        command = [sys.executable, "-m", "tools.faults.launcher", json.dumps(plan)]
        with open(self.folder / "launcher.log", "ab") as log:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait(self) -> int | None:
        """The launcher's exit code; None when it had to be killed because it did not end."""
        try:
            return self.launcher.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
            return None

    def log(self) -> str:
        path = self.folder / "launcher.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -- its processes ----------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Everything alive that this run has started, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, role: str) -> list[psutil.Process]:
        """The processes that play `role`."""
        if role == "launcher":
            return [psutil.Process(self.launcher.pid)]
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if MODULES[role] in words or (role == "verifier" and any(MODULES[role] in word for word in words)):
                    found.append(process)
        return found

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
    try:
        run.start(compile_cache)
        if fault.story is not None:
            fault.story(run)
        code = run.wait()
        run.struck |= run.fired.exists()
        if fault.launcher_dies and run.struck and code not in (0, 1, 2):
            problems += [f"after the launcher's death: {p}" for p in left_behind(run)]
            run.start(compile_cache)
            code = run.wait()
        problems += judge(run, code)
        problems += left_behind(run)
    finally:
        for process in run.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    written = [json.loads(line)["version"] for line in _lines(run.workdir / "trained.jsonl")]
    again = run.log().count("starting it again")
    return Outcome(
        fault.name, fault.role, seed, time.monotonic() - started, problems, run.struck, again,
        len(written) - len(set(written)), run.where,
    )  # fmt: skip


# --- What must be true afterwards ----------------------------------------------------------------------------------


def judge(run: Run, code: int | None) -> Iterator[str]:
    """What is wrong with the way the run ended, and with its accounts."""
    fault = run.fault
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
    again = run.log().count("starting it again")
    if fault.restarts is not None and not fault.launcher_dies and run.struck and again < fault.restarts:
        yield f"{again} processes were started again, expected {fault.restarts}"
    yield from accounts(run.workdir, fault.quarantined)
    yield from secrets(run.workdir)


def accounts(workdir: Path, quarantined: int) -> Iterator[str]:
    """Compares what the trainer wrote down with what the controller counted, and both with the data set."""
    steps, summary = read_trained(workdir), json.loads((workdir / "summary.json").read_text())
    if list(steps) != list(range(len(steps))):
        yield f"the steps are not one after another: {list(steps)}"
    seen = Counter((group.epoch, group.record) for groups in steps.values() for group in groups)
    if twice := [key for key, count in seen.items() if count > 1]:
        yield f"trained on more than once: {twice}"
    everything = {(epoch, i) for epoch in range(launcher.EPOCHS) for i in range(launcher.PROMPTS)}
    lost = everything - set(seen)
    if len(lost) != quarantined or set(seen) - everything:
        yield f"never trained on: {sorted(lost)}, not in the data: {sorted(set(seen) - everything)}"
    if numbers := [n for n, count in Counter(g.group for gs in steps.values() for g in gs).items() if count > 1]:
        yield f"groups trained on more than once: {numbers}"
    if short := [g for groups in steps.values() for g in groups if g.samples != launcher.GROUP]:
        yield f"groups without all their samples: {short}"
    bound = launcher.BOUND
    if old := [(v, g) for v, groups in steps.items() for g in groups if not 0 <= v - g.oldest <= bound]:
        yield f"beyond the bound of {bound}: {old}"
    counted = {
        "trained_groups": len(everything) - quarantined,
        "trained_samples": (len(everything) - quarantined) * launcher.GROUP,
        "quarantined": quarantined,
        "steps": len(steps),
    }
    if wrong := {name: summary.get(name) for name, value in counted.items() if summary.get(name) != value}:
        yield f"summary.json has {wrong}, expected {counted}"
    if summary.get("max_staleness", 99) > bound:
        yield f"summary.json has a staleness of {summary.get('max_staleness')}"
    ends = [{k: v for k, v in e.items() if v} for e in summary.get("epochs", [])]
    epoch = {"prompts": launcher.PROMPTS, "consumed": launcher.PROMPTS - quarantined, "quarantined": quarantined}
    wanted = [{k: v for k, v in (epoch | {"epoch": i}).items() if v} for i in range(launcher.EPOCHS)]
    if ends != wanted:
        yield f"the ledger closed its epochs with {ends}, expected {wanted}"
    rows = [row["step"] for row in read_metrics(workdir) if "actor/loss" in row]
    if rows != list(range(1, len(steps) + 1)):
        yield f"metrics.jsonl has the steps {rows}"
    if not (workdir / "export" / "model.safetensors").exists():
        yield "there is no exported checkpoint"


def secrets(workdir: Path) -> Iterator[str]:
    """What others could read: the folder itself, and keys in what the run wrote."""
    if workdir.stat().st_mode & 0o077:
        yield f"{workdir} is open to others"
    keys = [path.read_bytes() for path in (workdir / "keys").glob("*.secret")]
    for path in (*workdir.glob("logs/*"), *workdir.glob("*.json*"), *workdir.glob("timeline/*")):
        if any(key in path.read_bytes() for key in keys):
            yield f"a secret key is in {path}"


def left_behind(run: Run) -> Iterator[str]:
    """Processes, shared memory, temporary files, endpoints, the controller's journal."""
    deadline = time.monotonic() + GONE
    while (left := run.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        yield f"processes are left: {[' '.join(process.cmdline())[-200:] for process in left]}"
    if (memory := store.run_folder(run.workdir)).exists():
        yield f"shared memory is left: {sorted(path.name for path in memory.iterdir())}"
    ours = (path.name for path in run.temporary.iterdir() if not path.name.startswith("torchinductor_"))
    if files := sorted(ours):  # (the other is a cache of torch's, which transformers imports)
        yield f"temporary files are left: {files}"
    over = not run.fault.fails and (run.workdir / "summary.json").exists()
    names = ("endpoints/*", "silent/*", *(("controller", "weights/*") if over else ()))
    if files := [str(path.relative_to(run.workdir)) for name in names for path in run.workdir.glob(name)]:
        yield f"in the run's folder are left: {files}"


def tail(run: Run) -> str:
    """The last words of the launcher and of every role, for whoever must find out."""
    logs = {path.stem: log_tail(path, 3) for path in sorted((run.workdir / "logs").glob("*.log"))}
    return f"{log_tail(run.folder / 'launcher.log', 12)}; {logs}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
