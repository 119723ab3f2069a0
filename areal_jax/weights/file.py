"""A version's file while it is being written: new, or in the pages of an old one that nobody maps any more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

from areal_jax.weights import store


class NewFile:
    """A file in `folder` that gets its name only when it is whole; it moves to `fallback` when `folder` is full.

    A context manager; left without `finish`, it is removed. `write` may be called from several threads.
    """

    def __init__(self, folder: Path, fallback: Path):
        self._fallback = fallback
        self._idle = threading.Condition()
        self._writing, self._moving, self._finished = 0, False, False
        self._fd, self._path = _reuse(folder) or _create(folder)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset`."""
        while True:
            with self._idle:
                self._idle.wait_for(lambda: not self._moving)
                self._writing += 1
                fd = self._fd
            try:
                _write_all(fd, data, offset)
                return
            except OSError as error:
                if error.errno != errno.ENOSPC or self._path.parent == self._fallback:
                    raise
            finally:
                with self._idle:
                    self._writing -= 1
                    self._idle.notify_all()
            self._move(fd)

    def finish(self, name: str, size: int, *, sync: bool) -> Path:
        """Cut the file at `size` bytes and give it its name, at once and for good if `sync`."""
        os.ftruncate(self._fd, size)
        if sync:
            os.fsync(self._fd)
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        path = self._path.replace(self._path.with_name(name))
        self._finished = True
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return path

    def _move(self, full: int) -> None:
        """Go on in the fallback folder, unless another thread has already moved the file there."""
        with self._idle:
            if self._fd != full or self._moving:
                return
            self._moving = True
            self._idle.wait_for(lambda: not self._writing)
            try:
                fd, path = _create(store.make_private(self._fallback))
                with open(self._path, "rb") as old, open(fd, "wb", closefd=False) as new:
                    shutil.copyfileobj(old, new, 4 << 20)
                os.close(self._fd)
                self._path.unlink()
                self._fd, self._path = fd, path
            finally:
                self._moving = False
                self._idle.notify_all()


def _create(folder: Path) -> tuple[int, Path]:
    path = folder / store.PART
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path


def _reuse(folder: Path) -> tuple[int, Path] | None:
    """Take over the spare file if nobody maps it: its pages need not be cleared again, which halves the time."""
    spare, part = folder / store.SPARE, folder / store.PART
    try:
        fd = os.open(spare, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a reader still maps it, and keeps it: only the name goes
        os.close(fd)
        spare.unlink()
        return None
    spare.replace(part)
    return fd, part


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
