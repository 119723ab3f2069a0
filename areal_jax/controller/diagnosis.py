"""Who is waited for, in one line that a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from areal_jax.controller.core import Core
    from areal_jax.controller.fleet import Worker

SHOWN = 4  # workers named in one line


def waiting_for(core: Core, now: float) -> str:
    """What keeps the next batch from being formed."""
    if core.version < 0:
        return f"the trainer to publish its first version ({_role(core, 'trainer', now)})"
    if core.next_batch > core.version + 1:
        return f"the trainer to publish version {core.version + 1} ({_role(core, 'trainer', now)})"
    if not core.fleet.workers:
        gone = f"{core.counters['workers_died']} died, {core.counters['workers_left']} left"
        return f"a rollout worker: none is there ({gone})"
    if len(core.buffer) >= core.config.batch_size:
        if not core.buffer.wait:
            return f"the trainer to take batch {core.next_batch} ({_role(core, 'trainer', now)})"
        late = [group for group in core.ledger.open.values() if group.oldest is not None]
        group = min(late, key=lambda group: (group.oldest, group.number), default=None)
        if group is not None:
            names = sorted({sample.worker for sample in group.samples if sample.worker})
            missing = sum(sample.trajectories is None for sample in group.samples)
            due = group.oldest + core.config.max_staleness
            return (
                f"group {group.number}, begun at version {group.oldest} and due by step {due}: {missing} samples run "
                f"on {', '.join(names) or 'nobody'} (over_age='wait')"
            )
    busy = [worker for worker in core.fleet if worker.running or worker.evaluating or worker.updating is not None]
    text = "; ".join(_worker(core, worker, now) for worker in busy[:SHOWN])
    if len(busy) > SHOWN:
        text += f"; and {len(busy) - SHOWN} more workers"
    if busy:
        return text
    if core.ledger.queued:
        return f"a worker for {len(core.ledger.queued)} samples: {_fleet(core, now)}"
    if core.ledger.exhausted():
        return "nothing: every prompt has been used"
    if core.capacity <= 0:
        return f"the trainer: the staleness gate is full ({_role(core, 'trainer', now)})"
    return f"a worker with weights that may still be used: {_fleet(core, now)}"


def evaluation(core: Core, now: float) -> str:
    """What keeps the evaluation from being finished."""
    running = core.evaluations.current
    if running is None:
        return "no evaluation"
    done, total = len(running.done), running.problems * running.samples_per_problem
    names = sorted({name for name, _ in running.running.values()})
    where = "; ".join(_worker(core, core.fleet.workers[name], now) for name in names[:SHOWN])
    if not where:
        where = f"a worker with version {running.version}: {_fleet(core, now)}"
    return f"evaluation of version {running.version}, {done} of {total} samples done: {where}"


def _worker(core: Core, worker: Worker, now: float) -> str:
    doing = []
    if worker.running:
        doing.append(f"{len(worker.running)} samples running at version {worker.version}")
    if worker.evaluating:
        doing.append(f"{len(worker.evaluating)} evaluation samples at version {worker.version}")
    if worker.updating is not None:
        doing.append(f"loading version {worker.updating} for {now - worker.updating_since:.1f} s")
    return f"{worker.name}: {' and '.join(doing) or 'nothing to do'}, {_heard(core, worker.name, now)}"


def _fleet(core: Core, now: float) -> str:
    workers = list(core.fleet)
    shown = "; ".join(
        f"{worker.name} has version {worker.version} and room for {core.fleet.room(worker)}"
        + (f", {worker.loads_failed} loads of new weights failed" if worker.loads_failed else "")
        + f", {_heard(core, worker.name, now)}"
        for worker in workers[:SHOWN]
    )
    return shown or "no rollout worker is there"


def _role(core: Core, role: str, now: float) -> str:
    known = [party.name for party in core.telemetry.parties.values() if party.role == role]
    return "; ".join(f"{name}, {_heard(core, name, now)}" for name in known[:SHOWN]) or f"no {role} has said hello"


def _heard(core: Core, name: str, now: float) -> str:
    party = core.telemetry.parties[name]
    return f"last heard {now - party.heard:.1f} s ago: {party.phase}"
