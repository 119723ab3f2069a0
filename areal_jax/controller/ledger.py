"""Who does what: every prompt of every epoch, every open group and each of its samples. Nothing here knows the time.

A prompt is drawn, becomes a group, and ends in exactly one of: consumed, filtered, quarantined. A dropped group's
prompt is drawn again, under a new group number, before any other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from areal_jax.data.order import epoch_order
from areal_jax.transport.messages import GroupResult, Trajectory

OPEN, CONSUMED, FILTERED, QUARANTINED = 1, 2, 3, 4  # 0: not drawn yet
ENDS = {CONSUMED: "consumed", FILTERED: "filtered", QUARANTINED: "quarantined"}


class LedgerError(RuntimeError):
    """An invariant of the ledger is broken: a bug of the controller, never to be ignored."""


@dataclass
class Prompt:
    """One visit of one record, with the bad luck it had so far."""

    epoch: int
    index: int
    number: int = -1  # of the group to submit it as; -1: the next free one
    failures: int = 0  # samples that failed, over all attempts
    deaths: int = 0  # workers that died while they ran a sample of it
    lonely_deaths: int = 0  # of these, with no other suspect on board

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.index


@dataclass
class Sample:
    attempt: int = 0  # unique over all samples of a run
    failures: int = 0
    worker: str | None = None  # who runs it
    weights: int = -1  # version of that worker when it was assigned
    not_before: float = 0.0  # a failed one is tried again after a pause
    claim: tuple[str, int] | None = None  # queued, but (worker, its weights) may come back and still run this attempt
    trajectories: list[Trajectory] | None = None  # when it is done
    oldest: int = -1  # among its tokens, when it is done


@dataclass
class Group:
    number: int
    position: int  # in the count when it was submitted: 1, 2, ...
    prompt: Prompt
    samples: list[Sample]

    @property
    def done(self) -> bool:
        return all(sample.trajectories is not None for sample in self.samples)

    @property
    def oldest(self) -> int | None:
        """The oldest version that its tokens have or, where they are not there yet, may have; None: nothing runs."""
        versions = [s.oldest if s.trajectories is not None else s.weights for s in self.samples]
        return min((v for v in versions if v >= 0), default=None)

    def result(self) -> GroupResult:
        return GroupResult(
            group=self.number,
            record_index=self.prompt.index,
            epoch=self.prompt.epoch,
            samples=[sample.trajectories for sample in self.samples],
        )

    @property
    def uninformative(self) -> bool:
        """All samples have equal rewards, so that a group-relative advantage is zero everywhere."""
        rewards = [tuple(t.reward for t in sample.trajectories) for sample in self.samples]
        return all(reward == rewards[0] for reward in rewards)


@dataclass
class Ledger:
    """Prompts in order, and what became of each. `epochs` = 0 goes on for ever."""

    size: int
    seed: int
    epochs: int = 0
    shuffle: bool = True
    epoch: int = 0
    cursor: int = 0  # prompts of `epoch` drawn so far
    next_number: int = 0
    again: deque[Prompt] = field(default_factory=deque)  # drawn before, to be submitted before any new one
    open: dict[int, Group] = field(default_factory=dict)  # submitted, not finished
    queued: set[tuple[int, int]] = field(default_factory=set)  # (group, sample): open, not done, and nobody runs it
    fate: dict[int, bytearray] = field(default_factory=dict)  # epoch -> state of each record, until the epoch is over
    totals: Counter[str] = field(default_factory=Counter)  # prompts by end
    epochs_done: list[dict[str, int]] = field(default_factory=list)  # per finished epoch: prompts by end
    _order: tuple[int, list[int]] = (-1, [])

    def exhausted(self) -> bool:
        """Whether no prompt is left to submit."""
        return not self.again and self.epochs > 0 and self.epoch >= self.epochs

    def _draw(self) -> Prompt:
        if self.again:
            return self.again.popleft()
        if self._order[0] != self.epoch:
            self._order = self.epoch, epoch_order(self.size, self.seed, self.epoch, self.shuffle).tolist()
        prompt = Prompt(self.epoch, self._order[1][self.cursor])
        fate = self.fate.setdefault(self.epoch, bytearray(self.size))
        if fate[prompt.index]:
            raise LedgerError(f"record {prompt.index} of epoch {self.epoch} was drawn twice")
        fate[prompt.index] = OPEN
        self.cursor += 1
        if self.cursor == self.size:
            self.epoch, self.cursor = self.epoch + 1, 0
        return prompt

    def submit(self, position: int, group_size: int) -> Group:
        """Open the next prompt's group as number `position` of the count."""
        prompt = self._draw()
        number = prompt.number
        if number < 0:
            number, self.next_number = self.next_number, self.next_number + 1
        prompt.number = -1
        group = Group(number, position, prompt, [Sample() for _ in range(group_size)])
        self.open[number] = group
        self.queued.update((number, i) for i in range(group_size))
        return group

    def assign(self, group: Group, i: int, worker: str, weights: int, attempt: int) -> None:
        """`worker`, which has version `weights`, runs sample `i` from now on, as attempt `attempt`."""
        sample = group.samples[i]
        self.queued.remove((group.number, i))
        sample.attempt, sample.worker, sample.weights, sample.claim = attempt, worker, weights, None

    def unassign(self, group: Group, i: int, not_before: float = 0.0, claimable: bool = False) -> None:
        """Nobody runs sample `i` any more: it is tried again, not earlier than `not_before`.

        If `claimable`, the worker may have it back when it returns with it before somebody else has got it.
        """
        sample = group.samples[i]
        sample.claim = (sample.worker, sample.weights) if claimable else None
        sample.worker, sample.weights, sample.not_before = None, -1, not_before
        self.queued.add((group.number, i))

    def reclaim(self, group: Group, i: int, worker: str, attempt: int) -> bool:
        """`worker` says that it still runs `attempt` of sample `i`: whether it may go on with it."""
        sample = group.samples[i]
        if sample.claim is None or sample.claim[0] != worker or sample.attempt != attempt:
            return False
        self.queued.remove((group.number, i))
        sample.worker, sample.weights = sample.claim
        sample.claim = None
        return True

    def deliver(self, group: Group, i: int, trajectories: list[Trajectory]) -> bool:
        """Sample `i` is done; True when that finishes its group, which is then no longer open."""
        sample = group.samples[i]
        sample.worker, sample.trajectories = None, trajectories
        sample.oldest = min(trajectory.oldest_version for trajectory in trajectories)
        if group.done:
            del self.open[group.number]
        return group.done

    def close(self, group: Group) -> None:
        """`group` will not be finished: forget its samples. Its prompt is the caller's to end or to return."""
        self.open.pop(group.number, None)
        self.queued.difference_update((group.number, i) for i in range(len(group.samples)))

    def end(self, prompt: Prompt, how: int) -> None:
        """`prompt` has met its end, `how`; raises `LedgerError` if it had met one before."""
        fate = self.fate.get(prompt.epoch)
        if fate is None or fate[prompt.index] != OPEN:
            raise LedgerError(f"record {prompt.index} of epoch {prompt.epoch} ends twice: now {ENDS[how]}")
        fate[prompt.index] = how
        self.totals[ENDS[how]] += 1
        drawn_all = self.epoch > prompt.epoch
        if drawn_all and OPEN not in fate:
            self.epochs_done.append(
                {"epoch": prompt.epoch, "prompts": self.size} | {name: fate.count(code) for code, name in ENDS.items()}
            )
            del self.fate[prompt.epoch]


def consume(ledger: Ledger, counters: Counter[str], groups: Iterable[Group]) -> None:
    """These groups are trained on, for good."""
    for group in groups:
        ledger.end(group.prompt, CONSUMED)
        counters["trained_groups"] += 1
        counters["trained_samples"] += len(group.samples)
