"""Runs foreign Python programs in confined child processes, and gives back what they wrote.

Three isolations: `bwrap` (bubblewrap: own namespaces, nothing mounted but Python), `landlock` (Landlock, no privileges
needed), both with a seccomp filter; and `limits` (resource limits only; never chosen by itself). What holds where is
written down in docs/sandbox.md. This file starts and watches the children; `confine`, `exchange`, `harness` and
`assertions` run inside.
"""

import contextlib
import dataclasses
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from areal_jax.rewards import confine
from areal_jax.rewards.folders import make_folder, remove_folder
from areal_jax.rewards.outcome import VerifierError
from areal_jax.rewards.process import reap

ISOLATIONS = ("bwrap", "landlock", "limits")
_BOOT = """
import json, os, sys, types
with os.fdopen(int(sys.argv[1]), "rb") as f:
    modules, spec = json.load(f)
for name, source in modules:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
confine, main = sys.modules["areal_jax.rewards.confine"].confine, module.main
try:
    confine(spec)
except BaseException as e:
    os.write(spec["ready_fd"], f"E{type(e).__name__}: {e}".encode())
    os._exit(1)
os.write(spec["ready_fd"], b"R")
os.close(spec["ready_fd"])
sys.path += spec["packages"]
main(spec)
"""
_MODULES = {
    "script": ("confine", "exchange", "harness"),
    "calls": ("confine", "exchange", "harness"),
    "serve": ("confine", "exchange", "harness"),
    "tests": ("confine", "exchange", "assertions"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one sandboxed process may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0  # generous: on a busy machine a process gets little CPU per second
    memory_bytes: int = 1 << 30  # address space
    file_bytes: int = 16 << 20  # size of one file
    disk_bytes: int = 64 << 20  # scratch folder
    files: int = 10_000  # in the scratch folder (without bubblewrap)
    output_bytes: int = 4 << 20  # stdout, and stderr
    open_files: int = 64


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a program ended: `reason` is "" if it ended by itself with status 0, else a short name of what happened."""

    reason: str
    stdout: str
    stderr: str
    seconds: float
    frames: bytes = b""


class Child:
    """One confined process with its pipes; `spec` is what its role's `main` reads. `pass_fds` are closed here."""

    def __init__(
        self,
        spec: dict[str, Any],
        limits: Limits,
        isolation: str,
        *,
        stdin: bytes = b"",
        pass_fds: tuple[int, ...] = (),
    ):
        self.limits, self.isolation = limits, isolation
        self.scratch, self._folder, self._held = "", "", -1
        if isolation != "bwrap":  # below a folder that the program cannot reach: what marks it is safe there
            self._folder, self._held = make_folder("sandbox")
            self.scratch = os.path.join(self._folder, "scratch")
            os.mkdir(self.scratch, 0o700)
        self.stopped_for, self.unreaped = "", ""
        self.started = time.monotonic()
        self.received = {"stdout": bytearray(), "stderr": bytearray(), "ready": bytearray(), "frames": bytearray()}
        init_read, init_write = os.pipe()
        ready_read, ready_write = os.pipe()
        frames_read, frames_write = os.pipe()
        inherited = (init_read, ready_write, frames_write, *pass_fds)
        readable, packages = readable_paths(), package_paths()
        settings = dataclasses.asdict(limits) | {"isolation": isolation, "packages": packages, "ready_fd": ready_write}
        settings |= {"readable": [*readable, *packages], "writable": [self.scratch], "devices": ["/dev/null"]}
        modules = [(f"areal_jax.rewards.{name}", _source(name)) for name in _MODULES[spec["role"]]]
        payload = json.dumps((modules, {"write_fd": frames_write} | settings | spec)).encode()
        command = [sys._base_executable, "-S", "-s", "-P", "-c", _BOOT, str(init_read)]
        home = self.scratch or "/tmp"
        environment = {
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if isolation == "bwrap":
            command = [*bubblewrap([*readable, *packages], limits.disk_bytes), *command]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                start_new_session=True,
                cwd=self.scratch or None,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            for fd in (init_write, ready_read, frames_read):
                os.close(fd)
            self._remove_scratch()
            raise VerifierError(f"the sandbox could not be started: {error}") from error
        finally:
            for fd in inherited:
                os.close(fd)
        self.reading = {self.process.stdout.fileno(): "stdout", self.process.stderr.fileno(): "stderr"}
        self.reading |= {ready_read: "ready", frames_read: "frames"}
        self.writing = {init_write: memoryview(payload), self.process.stdin.fileno(): memoryview(stdin)}
        for fd in (*self.reading, *self.writing):
            os.set_blocking(fd, False)

    def handle(self, fd: int) -> bool:
        """Reads or writes `fd`, which is ready; False when it is done with."""
        if fd in self.writing:
            try:
                self.writing[fd] = self.writing[fd][os.write(fd, self.writing[fd][: 1 << 16]) :]
            except BrokenPipeError:
                return False
            return len(self.writing[fd]) > 0
        name = self.reading[fd]
        data = os.read(fd, 1 << 16)
        self.received[name] += data
        if len(self.received[name]) > (self.limits.output_bytes if name != "frames" else 32 << 20):
            self.stop("output_limit")
        return bool(data)

    def close_fd(self, fd: int) -> None:
        """Lets go of one of the pipes."""
        if self.writing.pop(fd, None) is not None or self.reading.pop(fd, None) is not None:
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                if not stream.closed and stream.fileno() == fd:
                    stream.close()
                    return
            os.close(fd)

    def stop(self, reason: str) -> None:
        """Kills the process group; the first reason stays."""
        self.stopped_for = self.stopped_for or reason
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def over_disk(self) -> bool:
        """Whether the scratch folder holds too much, or hides what it holds; bubblewrap's is a file system of limited
        size."""
        if not self.scratch:
            return False
        total, entries, unseen = 0, 0, []
        try:
            for folder, folders, names in os.walk(self.scratch, onerror=unseen.append):
                entries += len(folders) + len(names)
                if entries > self.limits.files:
                    return True
                for name in names:
                    with contextlib.suppress(OSError):
                        total += os.lstat(os.path.join(folder, name)).st_size
        except RecursionError:
            return True
        return total > self.limits.disk_bytes or any(isinstance(error, PermissionError) for error in unseen)

    def close(self) -> None:
        """Kills what is left, reaps, and removes the scratch folder."""
        self.seconds = time.monotonic() - self.started
        if not self.stopped_for:  # its peer ended, or it closed its pipes: then it is about to end as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        ended, silent = self.process.poll() is not None, self.process.stdout.closed
        self.stop("" if ended else "timeout" if silent else "stopped")
        self.unreaped = reap(self.process, "a sandboxed program")
        for fd, name in self.reading.items():
            if name == "ready":  # may have come since the last look, which was for another child
                with contextlib.suppress(BlockingIOError):
                    self.received[name] += os.read(fd, 1 << 16)
        for fd in (*self.reading, *self.writing):
            self.close_fd(fd)
        self._remove_scratch()

    def result(self) -> RunResult:
        """What it did, once closed. Raises `VerifierError` if it was never confined (then the program did not run), or
        cannot be ended."""
        if self.unreaped:
            raise VerifierError(self.unreaped)
        stdout, stderr = (self.received[name].decode(errors="replace") for name in ("stdout", "stderr"))
        code, ready = self.process.returncode, bytes(self.received["ready"])
        if ready != b"R":
            detail = ready[1:].decode() or stderr.strip()[-300:] or self.stopped_for or f"exit status {code}"
            raise VerifierError(f"the sandbox ({self.isolation}) could not be set up: {detail}")
        reason = self.stopped_for or _name(code, stderr)
        return RunResult(reason, stdout, stderr, self.seconds, bytes(self.received["frames"]))

    def _remove_scratch(self) -> None:
        if self._folder:
            remove_folder(self._folder)
            os.close(self._held)
            self._folder = ""


def run_children(children: list[Child]) -> list[RunResult]:
    """Runs `children` until the last of them ends or passes a limit; then all are killed. Their results."""
    try:
        _watch(children, children[-1])
    finally:
        for child in children:
            child.close()
    return [child.result() for child in children]


def _watch(children: list[Child], until: Child) -> None:
    deadline = until.started + until.limits.wall_seconds
    next_look = time.monotonic() + 0.1
    with selectors.DefaultSelector() as selector:
        for child in children:
            for fd in child.reading:
                selector.register(fd, selectors.EVENT_READ, child)
            for fd in child.writing:
                selector.register(fd, selectors.EVENT_WRITE, child)
        while until.reading and not until.stopped_for:
            now = time.monotonic()
            if now >= deadline:
                for child in children:
                    child.stop("timeout")
                return
            if now >= next_look:
                next_look = now + 0.1
                for child in children:
                    if child.over_disk():
                        child.stop("disk_limit")
            for key, _ in selector.select(min(deadline, next_look) - now):
                child: Child = key.data
                if not child.handle(key.fd):
                    selector.unregister(key.fd)
                    child.close_fd(key.fd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            until.process.wait(max(0.0, deadline - time.monotonic()))


def run_script(program: str, stdin: str = "", *, limits: Limits | None = None, isolation: str = "auto") -> RunResult:
    """Runs a Python program as a script in a sandbox. Raises `VerifierError` if there is no sandbox to run it in."""
    spec = {"role": "script", "program": program}
    child = Child(spec, limits or Limits(), choose(isolation), stdin=stdin.encode(errors="replace"))
    return run_children([child])[0]


def _name(code: int, stderr: str) -> str:
    """A short name for how a process ended, from its exit status and the last line of its stderr."""
    last = stderr.strip().rpartition("\n")[2][:300]
    number = -code if code < 0 else code - 128 if code > 128 else 0  # bubblewrap says 128 + signal
    if number == signal.SIGXCPU:
        return "cpu_limit"
    if last.startswith("MemoryError"):
        return "memory_limit"
    if code == 0:
        return ""
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    return f"exception: {last}" if last else f"exit status {code}"


@functools.cache
def _source(name: str) -> str:
    """The text of one of this package's modules, to be sent into a child."""
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@functools.cache
def readable_paths() -> tuple[str, ...]:
    """What a program may read: Python's own files and the system's libraries."""
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
    device = ("/dev/urandom", "/dev/zero")
    return (sys.base_prefix, *(path for path in (*system, *device) if os.path.exists(path)))


@functools.cache
def package_paths() -> tuple[str, ...]:
    """Where installed packages are (numpy, ...): readable, and at the end of the program's import path."""
    return tuple(dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib")))


def bubblewrap(readable: list[str], scratch_bytes: int) -> list[str]:
    """The start of the command: no network, no other processes, a read-only world, one scratch folder."""
    mounts = [part for path in readable if not path.startswith("/dev/") for part in ("--ro-bind-try", path, path)]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        mounts += ["--dev-bind-try", device, device]
    program = shutil.which("bwrap") or "bwrap"  # found here: the child's environment has no PATH
    command = [program, "--unshare-user", "--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", *mounts]
    return [*command, "--size", str(scratch_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


@functools.cache
def works(isolation: str) -> str:
    """Tries an isolation with a trivial program: "" if it works here, else why not."""
    if isolation != "limits" and not confine.supported():
        return "no system-call filter for this machine"
    if isolation == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        result = run_script("print(6 * 7)", isolation=isolation)
    except VerifierError as error:
        return str(error)
    return "" if result.stdout == "42\n" else f"the trial failed: {result.reason}"


def choose(isolation: str) -> str:
    """`isolation` itself, or for "auto" the strongest that works here. Raises `VerifierError` if there is none."""
    if isolation in ISOLATIONS:
        return isolation
    if isolation != "auto":
        raise VerifierError(f"isolation must be auto, {', '.join(ISOLATIONS)}, found {isolation!r}")
    problems = {}
    for kind in ("bwrap", "landlock"):
        problems[kind] = works(kind)
        if not problems[kind]:
            return kind
    listed = "; ".join(f"{kind}: {problem}" for kind, problem in problems.items())
    raise VerifierError(f"no sandbox for foreign code ({listed}); install bubblewrap, or accept isolation='limits'")
