"""Waiting for a disk that takes nothing more: with a limit, and in words that say which file it is about."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_SECONDS = 0.5
_RESERVE, _RESERVED = "reserve", 1 << 16  # a file in the run's folder, and its bytes


class DiskFull(RuntimeError):
    """A file could not be written for too long; the message names it."""


def reserve(workdir: str | os.PathLike) -> None:
    """Keep some room on the disk of the run's folder for what must be said when it is full. Raises `OSError`."""
    (Path(workdir) / _RESERVE).write_bytes(bytes(_RESERVED))


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
        where = f"{error.filename} cannot be written: {error.strerror}" if error.filename else str(error)
        self.problem = " ".join(where.split())
        if now - self._since > self._limit:
            raise DiskFull(f"{self.problem}; tried for {now - self._since:.0f} s (controller.disk_limit)")
        return first

    def succeeded(self) -> bool:
        """All is written; True if that is news."""
        was, self.problem = self.problem, ""
        return bool(was)


def insist(
    write: Callable[[], T],
    limit: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """What `write` returns, once it raises no `OSError`; raises `DiskFull` after `limit` seconds, or when told to stop.

    `write` must be such that it may be called again.
    """
    waiting = Waiting(limit)
    while True:
        try:
            result = write()
        except OSError as error:
            if waiting.failed(error, clock()):
                log.warning("%s; trying again for up to %.0f s", waiting.problem, limit)
            if stop():
                raise DiskFull(f"told to stop while {waiting.problem}") from error
            sleep(RETRY_SECONDS)
            continue
        if waiting.succeeded():
            log.warning("the disk takes writes again; going on")
        return result
