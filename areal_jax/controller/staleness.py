"""The staleness gate, as pure functions of counts and versions. Everything is counted in groups (prompts).

Lag of a group = trainer version at consumption - oldest version among its tokens; it must never exceed η
(arXiv 2505.24298, Eq. 3: ⌊(N - 1) / B⌋ ≤ version + η when group number N of the count is submitted).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def capacity(*, max_concurrent: int, batch_size: int, eta: int, version: int, accepted: int, running: int) -> int:
    """How many more groups may be submitted now; negative when the gate is overfull.

    `accepted`: groups finished or consumed so far; dropped, filtered and quarantined ones are not counted.
    `max_concurrent` = 0 leaves the number of running groups to the gate.
    """
    allowed = (eta + version + 1) * batch_size - (accepted + running)
    return min(max_concurrent - running, allowed) if max_concurrent else allowed


def admits(*, position: int, batch_size: int, eta: int, weights: int) -> bool:
    """Whether group `position` (1, 2, ... in the count) may be generated with version `weights`."""
    return (position - 1) // batch_size <= weights + eta


def feasible(deadlines: Iterable[int], *, batch_size: int, step: int) -> bool:
    """Whether every group can still be in a batch by its deadline, when batches `step`, `step` + 1, ... follow.

    A group's deadline is its oldest version + η: the last training step at which its lag is within the bound.
    """
    return all(due <= (deadline - step + 1) * batch_size for deadline, due in _due(sorted(deadlines)))


def _due(deadlines: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(deadline, number of groups due by it), for every deadline there is; `deadlines` must be sorted."""
    for count, deadline in enumerate(deadlines, 1):
        if count == len(deadlines) or deadlines[count] != deadline:
            yield deadline, count
