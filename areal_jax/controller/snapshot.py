"""The controller's whole state as one small msgpack value, to be stored in the trainer's checkpoint.

It holds the cursor in the data, what became of each prompt, the finished groups with their trajectories, and the
numbers of the groups in flight, which are submitted again under the same numbers (and so draw the same random
numbers). Batches that the trainer has taken but not finished are finished groups again.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from areal_jax.controller.ledger import Group, Ledger, Prompt, Sample, consume
from areal_jax.controller.report import count_lags
from areal_jax.transport.messages import Cancel, Trajectory, decode_hook, encode_hook

if TYPE_CHECKING:
    from areal_jax.controller.core import Core

FORMAT = 1


class StateError(ValueError):
    """The state cannot be used; the text says why."""


class PromptState(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    index: int
    number: int
    failures: int = 0
    deaths: int = 0
    lonely_deaths: int = 0


class FinishedState(msgspec.Struct, frozen=True, array_like=True):
    prompt: PromptState
    samples: list[list[Trajectory]]


class CoreState(msgspec.Struct, frozen=True):
    format: int
    version: int
    size: int
    seed: int
    shuffle: bool
    epoch: int
    cursor: int
    next_number: int
    fate: dict[int, bytes]
    totals: dict[str, int]
    epochs_done: list[dict[str, int]]
    queued: list[PromptState]  # to be submitted, in this order, before any new prompt
    finished: list[FinishedState]
    counters: dict[str, int]
    failed: dict[str, int]
    quarantined: list[str]
    lags: dict[int, int]
    token_lags: dict[int, int]


_encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_decoder = msgspec.msgpack.Decoder(CoreState, dec_hook=decode_hook)


def save(core: Core, version: int) -> bytes:
    """The state of training step `version`: batches before it are consumed, later ones are not."""
    ledger = copy_ledger(core.ledger)
    counters = Counter(core.counters)
    lags, token_lags = Counter(core.telemetry.lags), Counter(core.telemetry.token_lags)
    finished = list(core.buffer.groups.values())
    for number, groups in sorted(core.handed_groups.items()):
        if number < version:
            consume(ledger, counters, groups)
            count_lags(number, groups, lags, token_lags)
        else:
            finished += groups
    inflight = [_prompt(group.prompt, group.number) for _, group in sorted(ledger.open.items())]
    state = CoreState(
        format=FORMAT,
        version=version,
        size=ledger.size,
        seed=ledger.seed,
        shuffle=ledger.shuffle,
        epoch=ledger.epoch,
        cursor=ledger.cursor,
        next_number=ledger.next_number,
        fate={epoch: bytes(fate) for epoch, fate in ledger.fate.items()},
        totals=dict(ledger.totals),
        epochs_done=ledger.epochs_done,
        queued=sorted(
            inflight + [_prompt(prompt, prompt.number) for prompt in ledger.again if prompt.number >= 0],
            key=lambda prompt: prompt.number,
        )
        + [_prompt(prompt, -1) for prompt in ledger.again if prompt.number < 0],
        finished=[
            FinishedState(_prompt(group.prompt, group.number), [sample.trajectories for sample in group.samples])
            for group in sorted(finished, key=lambda group: group.number)
        ],
        counters=dict(counters),
        failed=dict(core.failed),
        quarantined=list(core.quarantined),
        lags=dict(lags),
        token_lags=dict(token_lags),
    )
    return _encoder.encode(state)


def copy_ledger(ledger: Ledger) -> Ledger:
    """A copy whose accounts can be changed; groups and prompts are shared."""
    return Ledger(
        ledger.size,
        ledger.seed,
        ledger.epochs,
        ledger.shuffle,
        epoch=ledger.epoch,
        cursor=ledger.cursor,
        next_number=ledger.next_number,
        again=ledger.again.copy(),
        open=dict(ledger.open),
        fate={epoch: bytearray(fate) for epoch, fate in ledger.fate.items()},
        totals=Counter(ledger.totals),
        epochs_done=list(ledger.epochs_done),
    )


def restore(core: Core, version: int, data: bytes) -> None:
    """Make `core` go on from `data`; raises `StateError`, and then nothing has changed.

    Where `core` has itself finished groups that `data` has in flight, without a token newer than `version`, they are
    kept. Everything that runs is cancelled; workers get their weights anew when `version` is published.
    """
    try:
        state = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise StateError(f"the controller's state does not decode: {error}") from None
    ledger = core.new_ledger()
    wanted = {"format": FORMAT, "version": version, "size": ledger.size, "seed": ledger.seed, "shuffle": ledger.shuffle}
    for name, value in wanted.items():
        if getattr(state, name) != value:
            raise StateError(
                f"the controller's state has {name} {getattr(state, name)!r}, this run has {value!r}: resume with the "
                f"data, seed and shuffle that the run began with"
            )
    ledger.epoch, ledger.cursor, ledger.next_number = state.epoch, state.cursor, state.next_number
    ledger.fate = {epoch: bytearray(fate) for epoch, fate in state.fate.items()}
    ledger.totals, ledger.epochs_done = Counter(state.totals), list(state.epochs_done)
    ready = {s.prompt.number: Group(s.prompt.number, 0, _revive(s.prompt), _done(s.samples)) for s in state.finished}
    live = [*core.buffer.groups.values(), *(group for groups in core.handed_groups.values() for group in groups)]
    fresh = {group.number: group for group in live if _newest(group) <= version}
    for prompt in state.queued:
        kept = fresh.get(prompt.number)
        if kept is not None and kept.prompt.key == (prompt.epoch, prompt.index):
            ready[prompt.number] = kept
        else:
            ledger.again.append(_revive(prompt))
    begin_again(core, ledger, version)
    core.counters, core.failed = Counter(state.counters), Counter(state.failed)
    core.quarantined.clear()
    core.quarantined.extend(state.quarantined)
    core.telemetry.lags, core.telemetry.token_lags = Counter(state.lags), Counter(state.token_lags)
    group_size = core.config.group_size
    for group in sorted(ready.values(), key=lambda group: group.number):
        if len(group.samples) == group_size:
            core.buffer.add(group)
        else:
            ledger.again.appendleft(group.prompt)


def begin_again(core: Core, ledger: Ledger, version: int) -> None:
    """Go on from training step `version` with `ledger`: nothing runs, nothing is finished, nobody has weights."""
    for group in list(core.ledger.open.values()):
        core.cancel(group)
    core.ledger = ledger
    core.buffer.groups.clear()
    core.handed.clear()
    core.handed_groups.clear()
    core.version, core.next_batch, core.manifest = -1, version, None
    core.lives += 1
    for name, slot in core.evaluations.abandon(version):
        core.send(name, Cancel(tasks=[slot]))
    for worker in core.fleet:
        worker.version, worker.updating, worker.retry_at = -1, None, 0.0
        worker.evaluating.clear()


def _newest(group: Group) -> int:
    return max(int(t.versions.max()) for sample in group.samples for t in sample.trajectories)


def _prompt(prompt: Prompt, number: int) -> PromptState:
    return PromptState(prompt.epoch, prompt.index, number, prompt.failures, prompt.deaths, prompt.lonely_deaths)


def _revive(state: PromptState) -> Prompt:
    return Prompt(state.epoch, state.index, state.number, state.failures, state.deaths, state.lonely_deaths)


def _done(samples: list[list[Trajectory]]) -> list[Sample]:
    return [Sample(trajectories=s, oldest=min(t.oldest_version for t in s)) for s in samples]
