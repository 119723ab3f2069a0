"""Who generates what: the staleness gate, the assignment of samples, and groups that leave the count."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from areal_jax.controller.buffer import Buffer
from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.evaluation import Evaluations
from areal_jax.controller.fleet import Fleet, Worker
from areal_jax.controller.ledger import QUARANTINED, Group, Ledger
from areal_jax.controller.report import Party, Telemetry
from areal_jax.controller.staleness import admits, capacity, feasible
from areal_jax.transport import messages as m

SUSPECT = 2  # workers that died on a prompt before it is kept apart from other suspects


@dataclass(frozen=True)
class Send:
    to: str  # name of a rollout worker
    message: m.Message


@dataclass(frozen=True)
class Stop:
    reason: str  # the run cannot go on: end with this diagnosis


@dataclass(frozen=True)
class Silent:
    """A process that was taken for dead has not come back either: whoever started it should kill and replace it."""

    name: str
    host: str
    pid: int
    seconds: float  # since its last word
    phase: str  # which was this


@dataclass(frozen=True)
class Loss:
    """What a worker ran when it was lost."""

    process: tuple[int, int]  # `Worker.process`
    groups: list[Group]
    suspects: list[Group]  # of these


class Scheduler:
    """The state of one run, and what follows from it; `Core` lets events in.

    Times are seconds on any clock that does not go back.
    `records` and `eval_records` are indexable by record number. `incarnation` must rise when a controller is started
    again for the same run: it keeps attempts of former lives apart from new ones. `steps`: training steps of the run,
    beyond whose batches nothing is generated; 0 for no end. `skipped_records`: of the data sets, for the report.
    """

    def __init__(
        self,
        config: ControllerConfig,
        records: Sequence[dict[str, Any]],
        eval_records: Sequence[dict[str, Any]] = (),
        *,
        seed: int = 1,
        rolling: bool = True,
        update_limit: float = 240.0,
        stop_on_failure: bool = False,
        incarnation: int = 0,
        steps: int = 0,
        skipped_records: int = 0,
        now: float = 0.0,
    ):
        self.config, self.records, self.seed, self.steps = config, records, seed, steps
        self.stop_on_failure, self.skipped_records = stop_on_failure, skipped_records
        self.version = -1  # newest published
        self.manifest: m.Manifest | None = None
        self.next_batch = 0  # the batch that is formed next
        self.handed: dict[int, m.Batch] = {}  # taken by the trainer, not yet consumed for good
        self.handed_groups: dict[int, list[Group]] = {}
        self.ledger = self.new_ledger()
        self.buffer = Buffer(config.batch_size, config.max_staleness, config.over_age == "wait")
        self.fleet = Fleet(rolling=rolling, update_limit=update_limit)
        self.evaluations = Evaluations(eval_records, config.eval_samples_per_prompt, config.max_attempts)
        self.telemetry = Telemetry(now)
        self.counters: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # failed attempts by name of the error
        self.quarantined: deque[str] = deque(maxlen=100)  # the last ones, in words
        self.missing: dict[str, Party] = {}  # taken for dead, and not back yet
        self.unreached: dict[str, Loss] = {}  # no message reaches them: dead, or cut off for a while
        self.outbox: list[Send | Stop | Silent] = []
        self.just_finished: list[Group] = []  # groups for the journal, which empties this
        self.changed = False  # whether a request that had to wait is worth asking again; whoever asks resets it
        self.stopped: str | None = None
        self.finished = False
        self.progress_at = now
        self.lives = 0  # times that the run went back to an earlier state
        self._attempts = incarnation << 32
        self._filtered_in_a_row = self._quarantined_in_a_row = 0
        self._tasks: dict[str, list[m.Task]] = {}

    def new_ledger(self) -> Ledger:
        return Ledger(len(self.records), self.seed, self.config.epochs, self.config.shuffle)

    def take_actions(self) -> list[Send | Stop | Silent]:
        """What is to be done since the last call, in order."""
        actions, self.outbox = self.outbox, []
        return actions

    # --- Scheduling ------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Groups in the count of the gate: consumed, finished and running ones."""
        return self.next_batch * self.config.batch_size + len(self.buffer) + len(self.ledger.open)

    @property
    def capacity(self) -> int:
        """Groups that the gate would let in now."""
        running = len(self.ledger.open)
        allowed = capacity(
            max_concurrent=self.config.max_concurrent,
            batch_size=self.config.batch_size,
            eta=self.config.max_staleness,
            version=self.version,
            accepted=self.count - running,
            running=running,
        )
        return min(allowed, self.steps * self.config.batch_size - self.count) if self.steps else allowed

    def _schedule(self, now: float) -> None:
        """Do whatever can be done now: weights first, then some evaluation, old groups, new groups, and the rest of it.

        An evaluation gets half of the slots of a few workers, and what training leaves of them: generation goes on.
        """
        self.changed = True
        if self.stopped or self.finished:
            return
        self._update_weights(now)
        self._evaluate(share=0.5, everywhere=False)
        for number, i in sorted(self.ledger.queued):
            group = self.ledger.open[number]
            if group.samples[i].not_before <= now and (worker := self._pick(group)):
                self._assign(group, i, worker)
        while self.capacity > 0 and not self.ledger.exhausted():
            position = self.count + 1
            if not any(self._admits(worker, position) for worker in self.fleet.suitable(self.fleet)):
                break
            group = self.ledger.submit(position, self.config.group_size)
            for i in range(len(group.samples)):
                if worker := self._pick(group):
                    self._assign(group, i, worker)
        self._evaluate(share=1.25, everywhere=not self.ledger.open)
        for name, tasks in self._tasks.items():
            self.send(name, m.Assign(tasks=tasks))
        self._tasks = {}

    def _evaluate(self, *, share: float, everywhere: bool) -> None:
        for worker, task in self.evaluations.assign(self.fleet, self._next_attempt, share=share, everywhere=everywhere):
            self._tasks.setdefault(worker.name, []).append(task)

    def _admits(self, worker: Worker, position: int) -> bool:
        return admits(
            position=position,
            batch_size=self.config.batch_size,
            eta=self.config.max_staleness,
            weights=worker.version,
        )

    def _pick(self, group: Group) -> Worker | None:
        """Who runs the next sample of `group`: the worker that has its others, else the emptiest that may."""
        holders = {sample.worker for sample in group.samples if sample.worker}
        ready = self.fleet.suitable(self.fleet)
        ready.sort(key=lambda worker: worker.name not in holders)
        return next((worker for worker in ready if self._may_run(worker, group)), None)

    def _may_run(self, worker: Worker, group: Group) -> bool:
        if not self._admits(worker, group.position):
            return False
        if group.prompt.deaths >= SUSPECT:
            others = {number for number, _ in worker.running if number != group.number}
            if any(self.ledger.open[number].prompt.deaths >= SUSPECT for number in others):
                return False
        oldest = self.version if group.oldest is None else group.oldest
        if self.buffer.wait and worker.version < oldest:
            waiting = [*self.buffer.groups.values(), *self.ledger.open.values()]
            versions = [g.oldest for g in waiting if g is not group and g.oldest is not None]
            deadlines = [version + self.config.max_staleness for version in (*versions, worker.version)]
            return feasible(deadlines, batch_size=self.config.batch_size, step=self.next_batch)
        return True

    def _assign(self, group: Group, i: int, worker: Worker) -> None:
        attempt = self._next_attempt()
        self.ledger.assign(group, i, worker.name, worker.version, attempt)
        worker.running.add((group.number, i))
        record = self.records[group.prompt.index]
        self._tasks.setdefault(worker.name, []).append(
            m.Task(group=group.number, sample=i, record=record, attempt=attempt)
        )

    def _next_attempt(self) -> int:
        self._attempts += 1
        return self._attempts

    def _update_weights(self, now: float) -> None:
        held, behind = self.evaluations.pins(self.fleet, self.version, now)
        for worker in behind:
            self._update(worker, self.evaluations.manifest, now)
        for worker in self.fleet.to_update(self.manifest, held, now):
            self._update(worker, self.manifest, now)

    def _update(self, worker: Worker, manifest: m.Manifest, now: float) -> None:
        worker.updating, worker.updating_to, worker.updating_since = manifest.version, manifest.published_at, now
        self.send(worker.name, m.UpdateWeights(manifest=manifest))

    def send(self, name: str, message: m.Message) -> None:
        """Have `message` sent to `name`."""
        self.outbox.append(Send(name, message))

    # --- Groups that leave the count -------------------------------------------------------------------------------

    def cancel(self, group: Group) -> None:
        """Stop whoever still works on `group`, and take it out of the count."""
        for i, sample in enumerate(group.samples):
            if sample.worker and (worker := self.fleet.workers.get(sample.worker)):
                worker.running.discard((group.number, i))
                self.send(worker.name, m.Cancel(tasks=[(group.number, i)]))
        self.ledger.close(group)
        self.buffer.groups.pop(group.number, None)

    def _drop(self, groups: Sequence[Group]) -> None:
        """These can be in no batch any more without exceeding the bound: their prompts are queued again."""
        for group in sorted(groups, key=lambda group: -group.number):
            self.cancel(group)
            self.ledger.again.appendleft(group.prompt)
            self.counters["dropped_stale"] += 1
            self.counters["dropped_stale_samples"] += sum(s.trajectories is not None for s in group.samples)

    def _quarantine(self, group: Group, why: str) -> None:
        self.cancel(group)
        self.ledger.end(group.prompt, QUARANTINED)
        self.counters["quarantined"] += 1
        self.quarantined.append(f"record {group.prompt.index} (epoch {group.prompt.epoch}): {why}")

    def _expire(self) -> None:
        """Drop every group, finished or not, that the next batch could not hold."""
        bound = self.next_batch - self.config.max_staleness
        waiting = [*self.buffer.groups.values(), *self.ledger.open.values()]
        self._drop([group for group in waiting if group.oldest is not None and group.oldest < bound])

    def stop(self, reason: str) -> None:
        """End the run with a diagnosis."""
        if self.stopped is None:
            self.stopped = reason
            self.shutdown(reason)
            self.outbox.append(Stop(reason))

    def shutdown(self, reason: str) -> None:
        """Ask every rollout worker and reward service to end."""
        for party in self.telemetry.parties.values():
            if party.role in ("rollout", "rewards"):
                self.send(party.name, m.Shutdown(reason=reason))
