"""Finished groups that wait for their batch, and the rule which of them make the next one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from areal_jax.controller.ledger import Group
from areal_jax.controller.staleness import feasible


@dataclass
class Buffer:
    """Groups by number. Oldest first; with `wait`, never so that an older group would miss its last batch."""

    batch_size: int
    eta: int
    wait: bool = False
    groups: dict[int, Group] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, group: Group) -> None:
        self.groups[group.number] = group

    def over_age(self, step: int) -> list[Group]:
        """Groups whose lag would exceed η in batch `step`."""
        return [group for group in self.groups.values() if step - group.oldest > self.eta]

    def choose(self, step: int, others: Iterable[Group], size: int) -> list[Group] | None:
        """The `size` groups of batch `step`, by number; None while it cannot be formed.

        `others` are the open groups: with `wait`, those that are due force the choice, or a pause. None of the
        groups may be over age.
        """
        if len(self.groups) < size:
            return None
        by_number = sorted(self.groups.values(), key=lambda group: group.number)
        if not self.wait:
            return by_number[:size]
        running = [group.oldest + self.eta for group in others if group.oldest is not None]
        by_deadline = sorted(by_number, key=lambda group: group.oldest)
        for order in (by_number, by_deadline):
            left = running + [group.oldest + self.eta for group in order[size:]]
            if feasible(left, batch_size=self.batch_size, step=step + 1):
                return sorted(order[:size], key=lambda group: group.number)
        return None

    def take(self, groups: Iterable[Group]) -> None:
        for group in groups:
            del self.groups[group.number]
