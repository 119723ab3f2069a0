"""Evaluation: the evaluation set, each problem a few times, on exactly one version of the weights, beside training."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_jax.controller.checks import fault
from areal_jax.controller.fleet import Fleet, Slot, Worker
from areal_jax.transport.messages import (
    EvaluationResult,
    Manifest,
    NotReady,
    Refused,
    SampleDone,
    SampleFailed,
    Task,
    Trajectory,
)


@dataclass
class Evaluation:
    """One run of the evaluation set. Groups are -1, -2, ... for the problems 0, 1, ..."""

    version: int
    problems: int
    samples_per_problem: int
    max_attempts: int
    queued: deque[Slot] = field(default_factory=deque)
    running: dict[Slot, tuple[str, int]] = field(default_factory=dict)  # -> worker, attempt
    tries: Counter[Slot] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # samples given up, by error
    done: dict[Slot, list[Trajectory]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queued.extend((-1 - i, k) for i in range(self.problems) for k in range(self.samples_per_problem))

    @property
    def finished(self) -> bool:
        return not self.queued and not self.running

    def assign(self, worker: str, attempt: int) -> Slot:
        """The next sample, now run by `worker` as attempt `attempt`."""
        slot = self.queued.popleft()
        self.tries[slot] += 1
        self.running[slot] = worker, attempt
        return slot

    def fail(self, slot: Slot, error: str) -> None:
        """The attempt that runs `slot` failed: another try, or a failure that is counted and never scored."""
        del self.running[slot]
        if self.tries[slot] >= self.max_attempts:
            self.failed[error] += 1
        else:
            self.queued.append(slot)

    def result(self) -> EvaluationResult:
        """Accuracy is the mean of the metric `accuracy`, or where there is none the share of positive rewards; None if
        every sample failed, which says nothing of the model."""
        last = [trajectories[-1] for trajectories in self.done.values()]
        if not last:
            failed = self.failed.total()
            return EvaluationResult(version=self.version, accuracy=None, samples=0, failed=failed)
        n = len(last)
        right = [t.metrics.get("accuracy", float(t.reward > 0)) for t in last]
        metrics = {
            "reward": sum(t.reward for t in last) / n,
            "tokens": sum(int(t.loss_mask.sum()) for t in last) / n,
            "truncated": sum(t.finish_reason == "length" for t in last) / n,
        }
        for name in sorted({name for t in last for name in t.metrics} - {"accuracy"} - set(metrics)):
            values = [t.metrics[name] for t in last if name in t.metrics]
            metrics[name] = sum(values) / len(values)
        return EvaluationResult(
            version=self.version,
            accuracy=sum(right) / n,
            samples=len(last),
            failed=self.failed.total(),
            metrics=metrics,
        )


class Evaluations:
    """The evaluation that runs, if any, and the results of the last ones. One runs at a time."""

    def __init__(self, records: Sequence[dict[str, Any]], samples_per_problem: int, max_attempts: int):
        self._records, self._samples, self._max_attempts = records, samples_per_problem, max_attempts
        self.current: Evaluation | None = None
        self.manifest: Manifest | None = None  # of the version that is evaluated
        self.results: dict[int, EvaluationResult | Refused] = {}

    def request(self, version: int, newest: Manifest | None) -> EvaluationResult | NotReady | Refused | None:
        """The result for `version`, or why there is none; None when it runs."""
        if version in self.results:
            return self.results[version]
        if not self._records:
            return Refused(reason="there is no evaluation data: set data.eval")
        if self.current is not None:
            if self.current.version == version:
                return None
            return NotReady(waiting_for=f"the evaluation of version {self.current.version} to end")
        if newest is None or newest.version != version:
            known = "none yet" if newest is None else newest.version
            return Refused(reason=f"version {version} is not the newest ({known}): ask right after Publish")
        self.current = Evaluation(version, len(self._records), self._samples, self._max_attempts)
        self.manifest = newest
        return None

    def published(self, manifest: Manifest) -> None:
        """Of a version that a trainer publishes again after its death, only the new bytes are still there."""
        if self.current is not None and self.current.version == manifest.version:
            self.manifest = manifest

    def pins(self, fleet: Fleet, newest: int, now: float) -> tuple[set[str], list[Worker]]:
        """(workers that must keep the version, workers that should load it although there is a newer one, `newest`).

        A quarter of the workers that have the version, one at least, keep it while there are problems to hand out. A
        publisher keeps the bytes of its two newest versions only, so an older one cannot be loaded any more.
        """
        running = self.current
        if running is None or not running.queued:
            return set(), []
        if chosen := self._chosen(fleet, len(fleet.workers) // 4):
            return {worker.name for worker in chosen}, []
        if any(worker.updating == running.version for worker in fleet):
            return set(), []
        idle = [worker for worker in fleet if worker.updating is None and not worker.evaluating]
        available = running.version >= newest - 1
        older = [worker for worker in idle if worker.version < running.version and available]
        if idle and not older and not running.running:
            reason = (
                f"no worker has version {running.version}, and none can load it any more: evaluate right after Publish"
            )
            self._end(Refused(reason=reason))
        return set(), [worker for worker in older if worker.retry_at <= now][:1]

    def _chosen(self, fleet: Fleet, count: int) -> list[Worker]:
        """The first `count` workers, one at least, of those that have exactly the version."""
        version = self.current.version
        having = [worker for worker in fleet if worker.version == version and worker.updating is None]
        return having[: max(1, count)]

    def assign(
        self, fleet: Fleet, next_attempt: Callable[[], int], *, share: float, everywhere: bool
    ) -> Iterator[tuple[Worker, Task]]:
        """Hand problems to workers with exactly the version, the emptiest first, as long as there is room.

        `share`: how much of a worker's slots evaluation may take. `everywhere`: use all workers that have the version,
        not only those that keep it: nothing else is to be generated.
        """
        running = self.current
        while running is not None and running.queued:
            chosen = self._chosen(fleet, len(fleet.workers) if everywhere else len(fleet.workers) // 4)
            free = (worker for worker in chosen if len(worker.evaluating) < max(1, share * worker.slots))
            ready = fleet.suitable(free)
            if not ready:
                return
            attempt = next_attempt()
            slot = running.assign(ready[0].name, attempt)
            ready[0].evaluating.add(slot)
            record = self._records[-1 - slot[0]]
            yield ready[0], Task(group=slot[0], sample=slot[1], record=record, attempt=attempt, evaluation=True)

    def done(self, done: SampleDone, worker: Worker | None) -> bool:
        """Take a result; False when nobody waits for it."""
        if not self._expected(done, worker):
            return False
        slot, version = (done.group, done.sample), self.current.version
        wrong = any(fault(t, version) or (t.versions[t.loss_mask] != version).any() for t in done.trajectories)
        if wrong or not done.trajectories:
            self.current.fail(slot, "malformed_trajectory" if wrong else "empty_sample")
        else:
            del self.current.running[slot]
            self.current.done[slot] = done.trajectories
        self._end_if_finished()
        return True

    def failed(self, failure: SampleFailed, worker: Worker | None) -> bool:
        """Take a failure; False when nobody waits for it."""
        if not self._expected(failure, worker):
            return False
        self.current.fail((failure.group, failure.sample), failure.error)
        self._end_if_finished()
        return True

    def _expected(self, result: SampleDone | SampleFailed, worker: Worker | None) -> bool:
        slot = result.group, result.sample
        if not self.runs(slot, result.name, result.attempt):
            return False
        if worker is not None:
            worker.evaluating.discard(slot)
        return True

    def runs(self, slot: Slot, name: str, attempt: int) -> bool:
        return self.current is not None and self.current.running.get(slot) == (name, attempt)

    def lost(self, slots: set[Slot]) -> None:
        """Whoever ran `slots` does not any more: they are tried again elsewhere."""
        for slot in sorted(slots):
            self.current.fail(slot, "worker_lost")
        self._end_if_finished()

    def abandon(self, version: int) -> list[tuple[str, Slot]]:
        """The run goes back to `version`: forget what runs (returned: who runs which) and the results of later ones."""
        running = [] if self.current is None else [(name, slot) for slot, (name, _) in self.current.running.items()]
        self.current = self.manifest = None
        self.results = {done: result for done, result in self.results.items() if done <= version}
        return running

    def _end_if_finished(self) -> None:
        if self.current is not None and self.current.finished:
            self._end(self.current.result())

    def _end(self, result: EvaluationResult | Refused) -> None:
        self.results[self.current.version] = result
        self.results = dict(list(self.results.items())[-16:])
        self.current = self.manifest = None
