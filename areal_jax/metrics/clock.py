"""A truthful clock: every second of a process belongs to exactly one named phase, and the phases add up to its age."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from areal_jax.metrics.lines import Lines


class Clock:
    """Time spent in each phase since construction; safe to use from several threads.

    There is one current phase at a time, whoever set it last: let one thread of a process (or one event loop) do so.
    `time_source` returns seconds that never decrease. With `trace`, a path, every phase that ended is appended there as
    a JSON line {"phase", "start", "end"} in seconds since the epoch: the timeline of the process (`tools/report.py`).
    """

    def __init__(
        self,
        initial: str = "starting",
        time_source: Callable[[], float] = time.monotonic,
        trace: str | os.PathLike | None = None,
    ):
        self._time = time_source
        self._trace = Lines(trace) if trace else None
        self._lock = threading.Lock()
        self._born = self._since = self._traced_since = time_source()
        self._epoch = time.time() - self._born
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
            if self._trace and name != previous:
                span = {"phase": previous, "start": self._epoch + self._traced_since, "end": self._epoch + now}
                self._trace.add(span)  # or not: no process ends for its timeline
                self._traced_since = now
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


def trace_path(workdir: str | os.PathLike, name: str) -> str:
    """Where the timeline of process `name` lies in a run's folder."""
    return os.path.join(workdir, "timeline", f"{name}.jsonl")


def idle_fraction(totals: dict[str, float]) -> float:
    """Share of the time, start-up left out, that a clock's `totals` spent idle or waiting; 0 for an empty clock."""
    running = {name: seconds for name, seconds in totals.items() if name != "starting"}
    whole = sum(running.values())
    idle = sum(seconds for name, seconds in running.items() if name == "idle" or name.startswith("waiting"))
    return idle / whole if whole > 0 else 0.0
