"""A run seen and judged from outside: its processes, its accounts, and what it has left behind.

The soak and the fault injection both use it. Everything that a run is judged by, it leaves itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from areal_jax.launch import child, session
from areal_jax.metrics.trained import TrainedGroup, read_trained
from areal_jax.metrics.writers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
MARK = "AREAL_JAX_WATCHED_RUN"  # set in the environment of everything that a run starts
SHARED_MEMORY = Path("/dev/shm")
ENDS = ("consumed", "filtered", "quarantined")
KINDS = {
    "areal_jax.controller": "controller", "areal_jax.rollout": "rollout", "areal_jax.rewards": "rewards",
    "areal_jax.trainer": "trainer", "areal_jax.launch": "launcher", "tools.faults.launcher": "launcher",
    "areal_jax.launch.guardian": "guardian",
}  # fmt: skip
LOOK_SECONDS = 0.5  # between two looks at who uses shared memory
VERIFIER = "areal_jax.rewards.worker"  # in the text of a program


# --- Its processes --------------------------------------------------------------------------------------------------


class Watched:
    """The run in `workdir`, with temporary files in `temporary`; found by two marks, as its launcher may be dead.

    One is in the environment. Programs under test have another environment and, in a sandbox, another session and root;
    but they inherit a limit on message queues, which nobody here uses: a number of the run's own.
    """

    def __init__(self, workdir: Path, temporary: Path):
        self.workdir, self.temporary, self.mark = workdir, temporary, uuid.uuid4().hex
        _, most = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
        most = 1 << 30 if most == resource.RLIM_INFINITY else most
        self.limit = random.SystemRandom().randrange(most // 2, most)
        self.launcher: subprocess.Popen | None = None
        self.shared_before = shared_memory()
        self.users: dict[str, bool] = {}  # of what came later into shared memory: whether the run was seen to use it
        temporary.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Of everything that belongs to the run: a user's, with the mark."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
        own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), MARK: self.mark}
        return kept | own

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        """Start a process of the run, which is told to end should this one die; what it says is added to `log`."""
        limited = f"import os, resource as r, sys; r.setrlimit(r.RLIMIT_MSGQUEUE, ({self.limit}, {self.limit})); "
        limited += "os.execvp(sys.argv[1], sys.argv[1:])"
        if self.launcher is None:
            threading.Thread(target=_look_on, args=(weakref.ref(self),), name="onlooker", daemon=True).start()
        with open(log, "ab") as file:
            return subprocess.Popen(
                [sys.executable, "-S", child.__file__, str(os.getpid()), "0", sys.executable, "-Sc", limited, *command],
                cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that live, whoever their parent is."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        if not _lives(process):
            return False
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == self.mark:
                return True
        with contextlib.suppress(psutil.Error):
            return process.rlimit(psutil.RLIMIT_MSGQUEUE) == (self.limit, self.limit)
        return False

    def roles(self) -> dict[str, list[psutil.Process]]:
        """{"rollout-0": [its process, its children ...], ...}; verifier processes are together under "verifier"."""
        groups: dict[int, list[psutil.Process]] = {}
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                groups.setdefault(os.getpgid(process.pid), []).append(process)
        found: dict[str, list[psutil.Process]] = {}
        for group, members in groups.items():
            leader = next((p for p in members if p.pid in (group, self.launcher.pid)), None)
            if leader is not None and (name := name_of(leader)):
                found.setdefault(name, []).extend([leader, *(p for p in members if p != leader)])
        return found

    def find(self, kind: str) -> list[psutil.Process]:
        """The processes that play a role, without their children."""
        return [process for process in self.processes() if name_of(process).partition("-")[0] == kind]

    def kill(self) -> None:
        """SIGKILL to everything."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def note_users(self) -> None:
        """Look at what is new in shared memory and in use: the run's, or another program's, which may leave it behind
        when it dies without making the run wrong."""
        for name in shared_memory() - self.shared_before - set(self.users):
            found = users(SHARED_MEMORY / name)
            if any(map(self._owns, found)):
                self.users[name] = True
            elif found and all(map(_lives, found)):  # else it may have been the run's, and died while it was asked
                self.users[name] = False

    # -- what it has left --------------------------------------------------------------------------------------------

    def left_behind(self, seconds: float, *, finished: bool, files: bool = True) -> list[str]:
        """What is still there `seconds` after the launcher's end, in words: processes, the run's lock, shared memory,
        temporary files and addresses (`files`: when somebody was left to remove them); and of a finished run the
        controller's journal and weights."""
        deadline = time.monotonic() + seconds
        while (left := list(self._left(finished, files))) and time.monotonic() < deadline:
            self.launcher.poll()
            time.sleep(0.2)  # other programs, too, put things into shared memory and take them away
        return left

    def _left(self, finished: bool, files: bool) -> Iterator[str]:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                yield f"process {process.pid} is left: {' '.join(process.cmdline())[-200:]}"
        if not lock_is_free(self.workdir):
            yield f"the lock of {self.workdir} is held"
        new = {name for name in shared_memory() - self.shared_before if self.users.get(name, True)}
        if memory := sorted(name for name in new if not users(SHARED_MEMORY / name)):
            yield f"in {SHARED_MEMORY} are left: {memory}"
        if not files:
            return
        ours = (path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor_"))
        if files := sorted(ours):  # (the other is a cache of torch's, which transformers imports)
            yield f"temporary files are left: {files}"
        names = ("endpoints/*", "silent/*", *(("controller", "weights/*") if finished else ()))
        if files := [str(path.relative_to(self.workdir)) for name in names for path in self.workdir.glob(name)]:
            yield f"in the run's folder are left: {files}"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def name_of(process: psutil.Process) -> str:
    """The name of the role that a process plays, "rollout-0"; "" for any other."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    kind = next((KINDS[word] for word in words if word in KINDS), "")
    if not kind and any(VERIFIER in word for word in words):
        return "verifier"
    index = re.search(r"--(?:index|process) (\d+)", " ".join(words))
    return f"{kind}-{index[1]}" if kind and index else kind


def shared_memory() -> set[str]:
    """Names of what is in the memory file system, semaphores among it."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def users(path: Path) -> list[psutil.Process]:
    """The living processes of this machine that have `path`, or something below it, open or mapped.

    A semaphore is mapped under another name (glibc links it to its own when it is ready), so its inode is looked for.
    """
    with contextlib.suppress(FileNotFoundError):
        inode = str(path.stat().st_ino)
        return [process for process in psutil.process_iter() if _uses(process.pid, path, inode)]
    return []


def _uses(pid: int, path: Path, inode: str) -> bool:
    with contextlib.suppress(OSError):
        maps = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        shared = [line for line in maps if len(line) == 6 and line[5].startswith(f"{SHARED_MEMORY}/")]
        if any(line[4] == inode or line[5].startswith(f"{path}/") for line in shared):
            return True
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                if target == str(path) or target.startswith(f"{path}/"):
                    return True
    return False


def _look_on(watched: weakref.ref) -> None:
    """For as long as somebody has the run's `Watched`."""
    while (run := watched()) is not None:
        run.note_users()
        del run
        time.sleep(LOOK_SECONDS)


def shared_bytes(processes: Sequence[psutil.Process]) -> int:
    """Bytes of shared memory, with a name or without, that `processes` have open; what several have counts once."""
    held = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor).startswith(("/memfd:", f"{SHARED_MEMORY}/")):
                        found = descriptor.stat()
                        held[found.st_dev, found.st_ino] = 512 * found.st_blocks
    return sum(held.values())


def lock_is_free(workdir: Path) -> bool:
    """Whether the run could be started."""
    with contextlib.suppress(FileNotFoundError), open(workdir / "launch.lock") as file:
        return session.take_lock(file)
    return True


# --- Its accounts ---------------------------------------------------------------------------------------------------


def newest_state(workdir: Path) -> Any:
    """The controller's state in the newest checkpoint (`controller.snapshot.CoreState`)."""
    from areal_jax.controller.snapshot import decode
    from areal_jax.trainer.checkpoint import read_controller

    return decode(read_controller(workdir / "checkpoints"))


def ledger_problems(
    trained: Mapping[int, Sequence[TrainedGroup]], state: Any, *, steps: int, bound: int, group_size: int
) -> list[str]:
    """Everything that is wrong after `steps` steps, in words.

    `trained` is from `metrics.trained.read_trained`, `state` the controller's in the checkpoint of that step.
    """
    from areal_jax.controller.ledger import CONSUMED, OPEN

    found = []
    if missing := set(range(steps)) - set(trained):
        found.append(f"no batch is known for steps {sorted(missing)[:10]}")
    times = Counter((group.epoch, group.record) for step, groups in trained.items() if step < steps for group in groups)
    found += [f"record {i} of epoch {epoch} was trained on {n} times" for (epoch, i), n in times.items() if n > 1]
    numbers = Counter(group.group for groups in trained.values() for group in groups)
    found += [f"group {number} was trained on {n} times" for number, n in numbers.items() if n > 1]
    for step, groups in trained.items():
        for group in groups:
            if not 0 <= step - group.oldest <= bound:
                found.append(
                    f"step {step} trained on version {group.oldest} (group {group.group}); the bound is {bound}"
                )
            if group.samples != group_size:
                found.append(f"step {step} trained on {group.samples} of {group_size} samples of group {group.group}")
    accounts = state.ledger
    by_epoch: dict[int, set[int]] = {}
    for epoch, record in times:
        by_epoch.setdefault(epoch, set()).add(record)
    for done in accounts.epochs_done:
        consumed, ended = len(by_epoch.get(done["epoch"], ())), sum(done.get(end, 0) for end in ENDS)
        if consumed != done.get("consumed", 0) or ended != done["prompts"]:
            found.append(f"epoch {done['epoch']}: {consumed} prompts were trained on; the ledger says {done}")
    waiting = [*accounts.again, *state.inflight, *(group.prompt for group in state.finished)]
    held = Counter((prompt.epoch, prompt.index) for prompt in waiting)
    for epoch, fate in accounts.fate.items():
        consumed = {record for record in range(len(fate)) if fate[record] == CONSUMED}
        drawn = {(epoch, record) for record in range(len(fate)) if fate[record] == OPEN}
        if differ := sorted(consumed ^ by_epoch.get(epoch, set())):
            found.append(f"epoch {epoch}: the ledger and the trainer differ on records {differ[:10]}")
        if lost := sorted(drawn - set(held)):
            found.append(f"lost, neither trained on nor waiting: {lost[:10]}")
    found += [f"record {record} of epoch {epoch} waits {n} times" for (epoch, record), n in held.items() if n > 1]
    found += [f"record {record} of epoch {epoch} waits, and was trained on" for epoch, record in set(held) & set(times)]
    return found


def summary_problems(workdir: Path, *, bound: int) -> list[str]:
    """How `summary.json` and `metrics.jsonl` of a finished run differ from what the trainer wrote down, in words."""
    trained, summary = read_trained(workdir), json.loads((workdir / "summary.json").read_text())
    found = []
    if list(trained) != list(range(len(trained))):
        found.append(f"the steps are not one after another: {list(trained)}")
    groups = [group for groups in trained.values() for group in groups]
    samples = sum(group.samples for group in groups)
    counted = {"trained_groups": len(groups), "trained_samples": samples, "steps": len(trained)}
    if wrong := {name: summary.get(name) for name, value in counted.items() if summary.get(name) != value}:
        found.append(f"summary.json has {wrong}, expected {counted}")
    if summary.get("max_staleness", 99) > bound:
        found.append(f"summary.json has a staleness of {summary.get('max_staleness')}; the bound is {bound}")
    rows = [row["step"] for row in read_metrics(workdir) if "actor/loss" in row]
    if rows != list(range(1, len(trained) + 1)):
        found.append(f"metrics.jsonl has the steps {rows}")
    if not (workdir / "export" / "model.safetensors").exists():
        found.append("there is no exported checkpoint")
    return found


def data_problems(workdir: Path, *, epochs: int, prompts: int, quarantined: int) -> list[str]:
    """Which prompts of so many whole epochs were not trained on exactly once, or `quarantined` of them put away."""
    trained, summary = read_trained(workdir), json.loads((workdir / "summary.json").read_text())
    seen = {(group.epoch, group.record) for groups in trained.values() for group in groups}
    everything = {(epoch, i) for epoch in range(epochs) for i in range(prompts)}
    found, lost = [], everything - seen
    if len(lost) != quarantined or seen - everything or summary.get("quarantined") != quarantined:
        found.append(
            f"never trained on: {sorted(lost)}, not in the data: {sorted(seen - everything)}, put away: "
            f"{summary.get('quarantined')}, expected {quarantined}"
        )
    ends = [{k: v for k, v in e.items() if v} for e in summary.get("epochs", [])]
    epoch = {"prompts": prompts, "consumed": prompts - quarantined, "quarantined": quarantined}
    wanted = [{k: v for k, v in (epoch | {"epoch": i}).items() if v} for i in range(epochs)]
    if ends != wanted:
        found.append(f"the ledger closed its epochs with {ends}, expected {wanted}")
    return found


def secrets(workdir: Path) -> Iterator[str]:
    """What others could read: the folder itself, and keys in what the run wrote."""
    if workdir.stat().st_mode & 0o077:
        yield f"{workdir} is open to others"
    keys = [path.read_bytes() for path in (workdir / "keys").glob("*.secret")]
    for path in (*workdir.glob("logs/*"), *workdir.glob("*.json*"), *workdir.glob("timeline/*")):
        if any(key in path.read_bytes() for key in keys):
            yield f"a secret key is in {path}"


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
