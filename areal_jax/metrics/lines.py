"""A file of JSON lines that one process appends to: every line is whole, whatever kills it or fills the disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from typing import Any

_BLOCK = 1 << 16
_KEPT = 1000  # lines that wait for room


class Lines:
    """Appends to the file at `path`, which is made with the first line. Half a line at its end, of a writer that was
    killed, is cut off first. `problem` says why lines given to `add` are not there yet, and how many will never be; ""
    when all are."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.problem = ""
        self._late: deque[Any] = deque()
        self._lost = 0
        self._fd, self._size, self._torn = -1, 0, False

    def append(self, value: Any) -> None:
        """Write `value` as a line, on its way to the disk on return. Raises `OSError`: then the file is as before."""
        rest = memoryview((json.dumps(value) + "\n").encode())
        try:
            if self._fd < 0:
                self._open()
            if self._torn:
                os.ftruncate(self._fd, self._size)
            size, self._torn = self._size + len(rest), True
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self._size, self._torn = size, False
        except OSError as error:
            if self._torn:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._size)
                    self._torn = False
            raise OSError(error.errno, error.strerror, self.path) from None

    def add(self, value: Any) -> bool:
        """As `append` for what is not worth an end: a line that cannot be written is written with a later one, unless
        there are too many: then the oldest is lost. Whether all others are written."""
        self._late.append(value)
        return self._catch_up()

    def _catch_up(self) -> bool:
        try:
            while self._late:
                self.append(self._late[0])
                self._late.popleft()
        except OSError as error:
            if len(self._late) > _KEPT:
                self._late.popleft()
                self._lost += 1
            self.problem = f"{self.path} cannot be written: {error.strerror}" + self._losses()
            return False
        self.problem = f"{self.path} is not whole" + self._losses() if self._lost else ""
        return True

    def _losses(self) -> str:
        return f"; {self._lost} lines are lost, as more than {_KEPT} had to wait for room" if self._lost else ""

    def close(self) -> None:
        """Let go of the file; `append` would open it again."""
        self._catch_up()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        self._size = _end_of_last_line(self._fd, size)
        if self._size < size:
            os.ftruncate(self._fd, self._size)


def _end_of_last_line(fd: int, size: int) -> int:
    while size > 0:
        start = max(0, size - _BLOCK)
        if (found := os.pread(fd, size - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        size = start
    return 0
