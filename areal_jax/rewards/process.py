"""One verifier process, seen from outside: start it, call it with a time limit that cannot be argued with, kill it.

Blocking, one call at a time; `pool.VerifierPool` runs many of these in threads.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from areal_jax.rewards.folders import make_folder, remove_folder
from areal_jax.rewards.outcome import Failure, Outcome, VerifierError
from areal_jax.rewards.worker import INSIDE_WORKER, LENGTH, Call, Reply

log = logging.getLogger(__name__)

REAP_SECONDS = 30.0  # for a process that got SIGKILL to end; only the kernel can hold it longer, at a disk, say

# Linux kills a worker when the *thread* that started it ends; so all workers are started by one thread that never does.
_starter = ThreadPoolExecutor(1, thread_name_prefix="verifier-starter")
_encode = msgspec.msgpack.Encoder(enc_hook=lambda value: value.tolist()).encode  # numpy arrays and scalars
_decode = msgspec.msgpack.Decoder(Reply).decode


class WorkerDied(VerifierError):
    """The worker's pipe closed before it answered."""


class WorkerOverran(VerifierError):
    """The worker did not answer in time."""


def worker_environment(folder: str) -> dict[str, str]:
    """This process's environment, with its import path, temporary files in `folder`, few threads, and a mark."""
    paths = [os.getcwd(), *(path for path in sys.path if path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TMPDIR": folder, INSIDE_WORKER: "1"}
    return os.environ | threads | own


class WorkerProcess:
    """A fresh interpreter that runs verifiers; its own process group, killed with everything in it.

    Args:
      memory_bytes: address-space limit of the process; 0 for none.
      start_timeout: seconds for the interpreter to start, and again for a verifier's module to import.
    """

    def __init__(self, *, memory_bytes: int = 0, start_timeout: float = 60.0):
        self.start_timeout = start_timeout
        self.calls = 0
        self._unread = bytearray()  # of its answers
        self._imported: set[str] = set()  # verifiers that it has called before
        self._folder, self._lock = make_folder()  # it may be killed before it cleans up
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `kill`)
        command = [sys.executable, "-c", "from areal_jax.rewards.worker import main; main()", str(memory_bytes)]
        self._process = _starter.submit(
            subprocess.Popen,
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env=worker_environment(self._folder),
            bufsize=0,
        ).result()
        self.pid = self._process.pid
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            self._receive(time.monotonic() + start_timeout)
        except VerifierError as error:
            self.kill()
            raise VerifierError(f"a verifier process did not start: {error}") from error

    def call(self, path: str, fields: Mapping[str, Any], timeout: float) -> Outcome:
        """Runs the verifier at `path`; after a `timeout` or `crash` the process is gone, and `alive` is False."""
        begin = time.monotonic()
        self.calls += 1
        try:
            frame = _encode(Call(path, dict(fields)))
        except (TypeError, AttributeError, msgspec.MsgspecError) as error:
            return Failure(kind="exception", text=f"{path}: a field cannot be sent to a verifier: {error}")
        limit = timeout if path in self._imported else self.start_timeout
        try:
            self._send(LENGTH.pack(len(frame)) + frame, begin + limit)
            reply = self._receive(begin + limit)
            if reply.stage == "running":
                self._imported.add(path)
                begin, limit = time.monotonic(), timeout
                reply = self._receive(begin + limit)
        except WorkerOverran:
            self.kill()
            text = f"{path}: no answer within {limit:g} s; the verifier process was killed"
            return Failure(kind="timeout", text=text, seconds=time.monotonic() - begin)
        except WorkerDied as error:
            self.kill()
            return Failure(kind="crash", text=f"{path}: {error}", seconds=time.monotonic() - begin)
        return reply.failure if reply.score is None else reply.score

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill_group(self) -> None:
        """Kills the process and everything in its group, without waiting; a call in flight ends as `crash`."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kills the process group, reaps the process and closes its pipes. Does nothing the second time."""
        if self._process.stdout.closed:
            return
        self.kill_group()
        if problem := reap(self._process, "a verifier process"):
            log.error("%s; going on without it", problem)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            stream.close()
        remove_folder(self._folder)
        os.close(self._lock)

    def _send(self, data: bytes, deadline: float) -> None:
        view, fd = memoryview(data), self._process.stdin.fileno()
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                _wait([], [fd], deadline)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise WorkerDied(self._obituary()) from error

    def _receive(self, deadline: float) -> Reply:
        (size,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        try:
            return _decode(self._read(size, deadline))
        except msgspec.MsgspecError as error:
            raise WorkerDied(f"the verifier process sent a malformed answer: {error}") from error

    def _read(self, size: int, deadline: float) -> bytes:
        fd = self._process.stdout.fileno()
        while len(self._unread) < size:
            _wait([fd], [], deadline)
            part = os.read(fd, 1 << 16)
            if not part:
                raise WorkerDied(self._obituary())
            self._unread += part
        data = bytes(self._unread[:size])
        del self._unread[:size]
        return data

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # its pipe is closed, so its end is near
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 1000))
        tail = self._stderr.read().decode(errors="replace").strip()
        code = self._process.poll()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return f"the verifier process ended with {how}" + (f"; it wrote: {tail}" if tail else "")


def reap(process: subprocess.Popen, name: str) -> str:
    """Waits for the end of a process that got SIGKILL; "", or in words that it has not come within `REAP_SECONDS`."""
    try:
        process.wait(REAP_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{name} (process {process.pid}) has not ended {REAP_SECONDS:g} s after SIGKILL: the kernel holds it"
    return ""


def _wait(readers: list[int], writers: list[int], deadline: float) -> None:
    """Waits for one file descriptor; `poll`, not `select`, because a service may hold more than 1,024 of them."""
    poller = select.poll()
    for fd in readers:
        poller.register(fd, select.POLLIN)
    for fd in writers:
        poller.register(fd, select.POLLOUT)
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poller.poll(remaining * 1000):
        raise WorkerOverran("no answer in time")
