"""The rollout workers: who is there, what each has, and whose turn it is to load new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from areal_jax.transport.messages import Manifest

Slot = tuple[int, int]  # (group, sample)


@dataclass
class Worker:
    name: str
    slots: int
    version: int  # of the weights it has; -1: none yet
    process: tuple[int, int] = (0, 0)  # its number, and what it drew when it began
    running: set[Slot] = field(default_factory=set)
    evaluating: set[Slot] = field(default_factory=set)
    updating: int | None = None  # version it was told to load, until it says how that went
    updating_since: float = 0.0
    updating_to: float = 0.0  # when that version was published: a life that went back may use its number again
    loads_failed: int = 0  # in a row; it is told again after a pause
    retry_at: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)  # of its last load

    @property
    def load(self) -> int:
        return len(self.running) + len(self.evaluating)


@dataclass
class Fleet:
    """`rolling`: workers load a version one after another, so that the fleet never stands still; a large fleet, where
    that would take longer than a training step, an eighth of it at once.

    `oversubscription`: samples per slot that a worker is given. Above 1 because a sample that is being verified still
    counts here while its slot in the engine is free again, and because the next one needs time to arrive; but little
    above while some worker's weights are older than another's, so that the first to load does not take all there is.
    """

    rolling: bool = True
    oversubscription: float = 2.0
    oversubscription_in_update: float = 1.25
    update_limit: float = 240.0  # seconds until a worker that says nothing about its new weights holds up nobody
    workers: dict[str, Worker] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def room(self, worker: Worker) -> int:
        even = len({worker.version for worker in self}) <= 1
        share = self.oversubscription if even else self.oversubscription_in_update
        return int(worker.slots * share) - worker.load

    def suitable(self, candidates: Iterable[Worker]) -> list[Worker]:
        """Those with weights and room, the emptiest first; ties go to the one that joined first."""
        ready = [worker for worker in candidates if worker.version >= 0 and self.room(worker) > 0]
        return sorted(ready, key=lambda worker: -self.room(worker))

    def to_update(self, manifest: Manifest | None, held: set[str], now: float) -> list[Worker]:
        """Workers that should be told to load `manifest` now. `held`: those that must keep what they have."""
        if manifest is None:
            return []
        behind = [
            worker
            for worker in self
            if worker.version != manifest.version
            and worker.updating is None
            and worker.retry_at <= now
            and not worker.evaluating
            and worker.name not in held
        ]
        new = [worker for worker in behind if worker.version < 0]
        if not self.rolling:
            return behind
        busy = sum(
            w.updating is not None and w.version >= 0 and now - w.updating_since < self.update_limit for w in self
        )
        old = sorted((worker for worker in behind if worker.version >= 0), key=lambda worker: worker.version)
        return new + old[: max(0, max(1, len(self.workers) // 8) - busy)]
