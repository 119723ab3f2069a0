"""A truthful clock: every second of a process belongs to exactly one named phase, and the phases add up to its age."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Time spent in each phase since construction; safe to use from several threads.

    There is one current phase at a time, whoever set it last: let one thread of a process (or one event loop) do so.
    `time_source` returns seconds that never decrease.
    """

    def __init__(self, initial: str = "starting", time_source: Callable[[], float] = time.monotonic):
        self._time = time_source
        self._lock = threading.Lock()
        self._born = self._since = time_source()
        self._phase = initial
        self._totals: dict[str, float] = {}

    @property
    def current(self) -> str:
        """The phase the process is in now."""
        return self._phase

    def enter(self, name: str) -> str:
        """Begin phase `name`; returns the phase that it ends."""
        with self._lock:
            previous, now = self._phase, self._time()
            self._totals[previous] = self._totals.get(previous, 0.0) + now - self._since
            self._phase, self._since = name, now
            return previous

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Spend the block in phase `name`, then go back to the phase before; blocks may be nested."""
        previous = self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def totals(self) -> dict[str, float]:
        """Seconds per phase, the current one up to now; their sum is `age()` at this moment."""
        with self._lock:
            totals = dict(self._totals)
            totals[self._phase] = totals.get(self._phase, 0.0) + self._time() - self._since
            return totals

    def age(self) -> float:
        """Seconds since construction."""
        return self._time() - self._born


def idle_fraction(totals: dict[str, float]) -> float:
    """Share of the time, start-up left out, that a clock's `totals` spent idle or waiting; 0 for an empty clock."""
    running = {name: seconds for name, seconds in totals.items() if name != "starting"}
    whole = sum(running.values())
    idle = sum(seconds for name, seconds in running.items() if name == "idle" or name.startswith("waiting"))
    return idle / whole if whole > 0 else 0.0
