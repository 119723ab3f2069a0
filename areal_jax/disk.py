"""Files that appear as a whole, and waiting, with a limit, for a disk that takes nothing more: in words that say which
file it is about."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_SECONDS = 0.5
_LONGEST_PAUSE = 30.0
NO_ROOM = "waiting:disk"  # the phase of a process that waits for room
_RESERVE, _RESERVED = "reserve", 1 << 16  # a file in the run's folder, and its bytes


class DiskFull(RuntimeError):
    """A file could not be written for too long; the message names it."""


def write_whole(path: str | os.PathLike, data: str | bytes, *, mode: int = 0o666) -> None:
    """Make `data` the content of the file `path`, at once or not at all; `mode` is cut by the umask.

    Raises `OSError` that names `path`; no draft is left then.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # several may write the same file
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # others need the room
            draft.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def reserve(workdir: str | os.PathLike) -> None:
    """Keep some room on the disk of the run's folder for what must be said when it is full. Raises `OSError`."""
    with open(Path(workdir) / _RESERVE, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # zeros might be kept as no bytes at all
            os.posix_fallocate(file.fileno(), 0, _RESERVED)
        else:
            file.write(bytes(_RESERVED))


def release(workdir: str | os.PathLike) -> None:
    """Give it back, for somebody's last words."""
    with contextlib.suppress(OSError):
        (Path(workdir) / _RESERVE).unlink()


class Waiting:
    """Whether, and for how long, writes have failed; `problem` says what is wrong, "" while all is well."""

    def __init__(self, limit: float):
        self.problem, self._limit, self._since = "", limit, 0.0

    def failed(self, error: OSError, now: float) -> bool:
        """A write has failed; True for the first one. Raises `DiskFull` once this has lasted for the limit."""
        first = not self.problem
        if first:
            self._since = now
        self.problem = _in_words(error)
        if now - self._since > self._limit:
            raise DiskFull(f"{self.problem}; tried for {now - self._since:.0f} s (controller.disk_limit)")
        return first

    def succeeded(self) -> bool:
        """All is written; True if that is news."""
        was, self.problem = self.problem, ""
        return bool(was)


def _in_words(error: OSError) -> str:
    where = f"{error.filename} cannot be written: {error.strerror}" if error.filename else str(error)
    return " ".join(where.split())


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """For whoever must not wait for room: the first `OSError` is a `DiskFull`."""
    try:
        yield
    except OSError as error:
        raise DiskFull(f"{_in_words(error)}; several trainer processes do not wait for room") from error


def insist(
    write: Callable[[], T],
    limit: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda problem: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """What `write` returns, once it raises no `OSError`; raises `DiskFull` after `limit` seconds, or when told to stop.

    `write` must be such that it may be called again. One that takes long is tried less often: a pause is as long as the
    try was, within limits. `tell` gets what is wrong after each of them, and "" at the end.
    """
    waiting = Waiting(limit)
    while True:
        began = clock()
        try:
            result = write()
        except OSError as error:
            now = clock()
            if waiting.failed(error, now):
                log.warning("%s; trying again for up to %.0f s", waiting.problem, limit)
            tell(waiting.problem)
            if stop():
                raise DiskFull(f"told to stop while {waiting.problem}") from error
            again = now + min(now - began, _LONGEST_PAUSE)
            sleep(RETRY_SECONDS)
            while clock() < again and not stop():
                sleep(RETRY_SECONDS)
            continue
        if waiting.succeeded():
            log.warning("the disk takes writes again; going on")
            tell("")
        return result
