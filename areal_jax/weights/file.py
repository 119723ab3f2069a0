"""A version's file while it is being written: new, or in the pages of an old one that nobody maps any more.

In memory a file has no name at all: others reach it as a descriptor of its publisher, `/proc/PID/fd/N`, and the kernel
frees it with the last process that has it, however all of them die. What it holds is said by its last bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

from areal_jax.weights import store


@dataclasses.dataclass(frozen=True)
class Finished:
    """A whole version: a named file, or one in memory, which lives as long as `fd` or whoever maps it."""

    name: str
    path: Path  # for others
    fd: int = -1  # -1: a named file

    def retire(self) -> int:
        """Take it out of sight; returns the descriptor of pages that may be used again, or -1."""
        if self.fd < 0:
            self.path.unlink(missing_ok=True)
        else:
            size = os.fstat(self.fd).st_size - len(self.name)
            os.pwrite(self.fd, bytes(len(self.name)), size)
        return self.fd

    def remove(self) -> None:
        """Gone for good; processes that map it keep it until they let go."""
        if (fd := self.retire()) >= 0:
            os.close(fd)


class NewFile:
    """A file in memory, or in `disk`, that others find only when it is whole.

    A context manager; left without `finish`, it is removed. `write` may be called from several threads.

    Args:
      memory: the memory file system; None: write to `disk`. When it is full, the file moves to `disk`.
      spare: the descriptor of pages to use again, or -1. It is taken over: used or closed.
    """

    def __init__(self, memory: Path | None, disk: Path, spare: int = -1):
        self._disk = disk
        self._idle = threading.Condition()
        self._writing, self._moving, self._finished = 0, False, False
        self._path: Path | None = None  # None: in memory
        self._fd = _reuse(spare)
        if self._fd < 0:
            self._fd, self._path = (_unnamed(memory), None) if memory else _create(disk)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not error.filename:  # of a full disk: for whoever must make room
            error.filename = str(self._path or self._disk)
        if self._path is None and self._finished:
            return
        os.close(self._fd)
        if not self._finished and self._path is not None:
            self._path.unlink(missing_ok=True)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset`."""
        while True:
            with self._idle:
                self._idle.wait_for(lambda: not self._moving)
                self._writing += 1
                fd, in_memory = self._fd, self._path is None
            try:
                _write_all(fd, data, offset)
                return
            except OSError as error:
                if error.errno != errno.ENOSPC or not in_memory:
                    raise
            finally:
                with self._idle:
                    self._writing -= 1
                    self._idle.notify_all()
            self._move(fd)

    def finish(self, name: str, size: int, *, sync: bool) -> Finished:
        """Cut the file at `size` bytes and give it its name, at once and for good if `sync`."""
        os.ftruncate(self._fd, size)
        if self._path is None:
            _write_all(self._fd, memoryview(name.encode()), size)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._finished = True
            return Finished(name, Path(f"/proc/{os.getpid()}/fd/{self._fd}"), self._fd)
        if sync:
            os.fsync(self._fd)
        path = self._path.replace(self._path.with_name(name))
        self._finished = True
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return Finished(name, path)

    def _move(self, full: int) -> None:
        """Go on on the disk, unless another thread has already moved the file there."""
        with self._idle:
            if self._fd != full or self._moving:
                return
            self._moving = True
            self._idle.wait_for(lambda: not self._writing)
            try:
                fd, path = _create(store.make_private(self._disk))
                os.lseek(full, 0, os.SEEK_SET)
                try:
                    with open(full, "rb", closefd=False) as old, open(fd, "wb", closefd=False) as new:
                        shutil.copyfileobj(old, new, 4 << 20)
                except BaseException:  # others need the room, and this may be tried again
                    os.close(fd)
                    path.unlink()
                    raise
                os.close(full)
                self._fd, self._path = fd, path
            finally:
                self._moving = False
                self._idle.notify_all()


def _unnamed(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # of this user alone, and never to be found by name
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 0)


def _create(folder: Path) -> tuple[int, Path]:
    path = folder / store.PART
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path


def _reuse(spare: int) -> int:
    """`spare` if nobody maps it, else -1: its pages need not be cleared again, which halves the time."""
    if spare >= 0:
        try:
            fcntl.flock(spare, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a reader still maps it, and keeps it
            os.close(spare)
            return -1
    return spare


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
