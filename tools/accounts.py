"""Holds what a run was trained on, by its trainer's own record, against the ledger in its checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_jax.metrics.trained import TrainedGroup

ENDS = ("consumed", "filtered", "quarantined")


def problems(
    trained: Mapping[int, Sequence[TrainedGroup]], ledger: Any, *, steps: int, bound: int, group_size: int
) -> list[str]:
    """Everything that is wrong after `steps` steps, in words.

    `trained` is from `metrics.trained.read_trained`, `ledger` the controller's state in the checkpoint of that step.
    """
    from areal_jax.controller.ledger import CONSUMED, OPEN

    found = []
    if missing := set(range(steps)) - set(trained):
        found.append(f"no batch is known for steps {sorted(missing)[:10]}")
    times = Counter((group.epoch, group.record) for step, groups in trained.items() if step < steps for group in groups)
    found += [f"record {i} of epoch {epoch} was trained on {n} times" for (epoch, i), n in times.items() if n > 1]
    for step, groups in trained.items():
        for group in groups:
            if not 0 <= step - group.oldest <= bound:
                found.append(
                    f"step {step} trained on version {group.oldest} (group {group.group}); the bound is {bound}"
                )
            if group.samples != group_size:
                found.append(f"step {step} trained on {group.samples} of {group_size} samples of group {group.group}")
    accounts = ledger.ledger
    by_epoch: dict[int, set[int]] = {}
    for epoch, record in times:
        by_epoch.setdefault(epoch, set()).add(record)
    for done in accounts.epochs_done:
        consumed, ended = len(by_epoch.get(done["epoch"], ())), sum(done.get(end, 0) for end in ENDS)
        if consumed != done.get("consumed", 0) or ended != done["prompts"]:
            found.append(f"epoch {done['epoch']}: {consumed} prompts were trained on; the ledger says {done}")
    waiting = [*accounts.again, *ledger.inflight, *(group.prompt for group in ledger.finished)]
    held = Counter((prompt.epoch, prompt.index) for prompt in waiting)
    for epoch, fate in accounts.fate.items():
        consumed = {record for record in range(len(fate)) if fate[record] == CONSUMED}
        drawn = {(epoch, record) for record in range(len(fate)) if fate[record] == OPEN}
        if differ := sorted(consumed ^ by_epoch.get(epoch, set())):
            found.append(f"epoch {epoch}: the ledger and the trainer differ on records {differ[:10]}")
        if lost := sorted(drawn - set(held)):
            found.append(f"lost, neither trained on nor waiting: {lost[:10]}")
    found += [f"record {record} of epoch {epoch} waits {n} times" for (epoch, record), n in held.items() if n > 1]
    found += [f"record {record} of epoch {epoch} waits, and was trained on" for epoch, record in set(held) & set(times)]
    return found


def newest_state(workdir: Path) -> Any:
    """The controller's state in the newest checkpoint (`controller.snapshot.CoreState`)."""
    from areal_jax.controller.snapshot import decode
    from areal_jax.trainer.checkpoint import read_controller

    return decode(read_controller(workdir / "checkpoints"))
