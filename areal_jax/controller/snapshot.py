"""The controller's whole state as one small msgpack value, to be stored in the trainer's checkpoint.

It holds the cursor in the data, what became of each prompt, the finished groups with their trajectories, and the
numbers of the groups in flight, which are submitted again under the same numbers (and so draw the same random
numbers). Batches that the trainer has taken but not finished are finished groups again.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

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
    number: int  # of its group; -1: none yet
    failures: int = 0
    deaths: int = 0
    lonely_deaths: int = 0

    def names(self, prompt: Prompt) -> bool:
        return (self.epoch, self.index) == prompt.key


class FinishedState(msgspec.Struct, frozen=True, array_like=True):
    prompt: PromptState
    samples: list[list[Trajectory]]


class LedgerState(msgspec.Struct, frozen=True):
    """The accounts: small, and without trajectories."""

    size: int
    seed: int
    shuffle: bool
    epoch: int
    cursor: int
    next_number: int
    fate: dict[int, bytes]
    totals: dict[str, int]
    epochs_done: list[dict[str, int]]
    again: list[PromptState]  # to be submitted, in this order, before any new prompt
    counters: dict[str, int]
    failed: dict[str, int]
    quarantined: list[str]
    lags: dict[int, int]
    token_lags: dict[int, int]


class CoreState(msgspec.Struct, frozen=True):
    format: int
    version: int
    ledger: LedgerState
    inflight: list[PromptState]
    finished: list[FinishedState]


encode = msgspec.msgpack.Encoder(enc_hook=encode_hook).encode
decode_finished = msgspec.msgpack.Decoder(FinishedState, dec_hook=decode_hook).decode
decode = msgspec.msgpack.Decoder(CoreState, dec_hook=decode_hook).decode  # of what `save` gave


def save(core: Core, version: int) -> bytes:
    """The state of training step `version`: batches before it are consumed, later ones are not."""
    ledger = _copy(core.ledger)
    counters = Counter(core.counters)
    lags, token_lags = Counter(core.telemetry.lags), Counter(core.telemetry.token_lags)
    finished = list(core.buffer.groups.values())
    for number, groups in sorted(core.handed_groups.items()):
        if number < version:
            consume(ledger, counters, groups)
            count_lags(number, groups, lags, token_lags)
        else:
            finished += groups
    finished.sort(key=lambda group: group.number)
    state = CoreState(
        format=FORMAT,
        version=version,
        ledger=describe(core, ledger, counters, lags, token_lags),
        inflight=[prompt_state(group.prompt, group.number) for _, group in sorted(ledger.open.items())],
        finished=[finished_state(group) for group in finished],
    )
    return encode(state)


def describe(
    core: Core, ledger: Ledger, counters: Counter[str], lags: Counter[int], token_lags: Counter[int]
) -> LedgerState:
    """The accounts of `core`, with these in place of its own."""
    return LedgerState(
        size=ledger.size,
        seed=ledger.seed,
        shuffle=ledger.shuffle,
        epoch=ledger.epoch,
        cursor=ledger.cursor,
        next_number=ledger.next_number,
        fate={epoch: bytes(fate) for epoch, fate in ledger.fate.items()},
        totals=dict(ledger.totals),
        epochs_done=ledger.epochs_done,
        again=[prompt_state(prompt, prompt.number) for prompt in ledger.again],
        counters=dict(counters),
        failed=dict(core.failed),
        quarantined=list(core.quarantined),
        lags=dict(lags),
        token_lags=dict(token_lags),
    )


def rebuild(core: Core, state: LedgerState) -> Ledger:
    """The ledger of `state`, and its counts put into `core`; raises `StateError` if it belongs to other data."""
    ledger = core.new_ledger()
    for name in ("size", "seed", "shuffle"):
        if getattr(state, name) != getattr(ledger, name):
            raise StateError(
                f"the controller's state has {name} {getattr(state, name)!r}, this run has {getattr(ledger, name)!r}: "
                f"resume with the data, seed and shuffle that the run began with"
            )
    ledger.epoch, ledger.cursor, ledger.next_number = state.epoch, state.cursor, state.next_number
    ledger.fate = {epoch: bytearray(fate) for epoch, fate in state.fate.items()}
    ledger.totals, ledger.epochs_done = Counter(state.totals), list(state.epochs_done)
    ledger.again.extend(revive(prompt) for prompt in state.again)
    core.counters, core.failed = Counter(state.counters), Counter(state.failed)
    core.quarantined.clear()
    core.quarantined.extend(state.quarantined)
    core.telemetry.lags, core.telemetry.token_lags = Counter(state.lags), Counter(state.token_lags)
    core.telemetry.counts_restored(core)
    return ledger


def restore(core: Core, version: int, data: bytes) -> None:
    """Make `core` go on from `data`; raises `StateError`, and then nothing has changed.

    Where `core` has itself finished groups that `data` has in flight, without a token newer than `version`, they are
    kept. Everything that runs is cancelled; workers get their weights anew when `version` is published.
    """
    try:
        state = decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise StateError(f"the controller's state does not decode: {error}") from None
    if (state.format, state.version) != (FORMAT, version):
        found, wanted = f"format {state.format}, version {state.version}", f"format {FORMAT}, version {version}"
        raise StateError(f"the controller's state has {found}, expected {wanted}")
    ledger = rebuild(core, state.ledger)
    ready = [finished_group(finished) for finished in state.finished]
    live = [*core.buffer.groups.values(), *(group for groups in core.handed_groups.values() for group in groups)]
    fresh = {group.number: group for group in live if _newest(group) <= version}
    inflight = []
    for prompt in state.inflight:
        kept = fresh.get(prompt.number)
        if kept is not None and prompt.names(kept.prompt):
            ready.append(kept)
        else:
            inflight.append(revive(prompt))
    for group in [group for group in ready if len(group.samples) != core.config.group_size]:
        ready.remove(group)
        group.prompt.number = group.number
        inflight.append(group.prompt)
    ledger.again.extendleft(sorted(inflight, key=lambda prompt: -prompt.number))
    begin_again(core, ledger, version)
    for group in sorted(ready, key=lambda group: group.number):
        core.buffer.add(group)
        core.just_finished.append(group)


def begin_again(core: Core, ledger: Ledger, version: int) -> None:
    """Go on from training step `version` with `ledger`: nothing runs, nothing is finished, nobody has weights."""
    for group in list(core.ledger.open.values()):
        core.cancel(group)
    core.ledger = ledger
    core.buffer.groups.clear()
    core.just_finished.clear()
    core.handed.clear()
    core.handed_groups.clear()
    core.version, core.next_batch, core.manifest = -1, version, None
    core.lives += 1
    for name, slot in core.evaluations.abandon(version):
        core.send(name, Cancel(tasks=[slot]))
    for worker in core.fleet:
        worker.version, worker.updating, worker.retry_at = -1, None, 0.0
        worker.evaluating.clear()


def prompt_state(prompt: Prompt, number: int) -> PromptState:
    return PromptState(prompt.epoch, prompt.index, number, prompt.failures, prompt.deaths, prompt.lonely_deaths)


def revive(state: PromptState, keep_number: bool = True) -> Prompt:
    """The prompt of `state`, to be submitted under its old number if `keep_number`."""
    number = state.number if keep_number else -1
    return Prompt(state.epoch, state.index, number, state.failures, state.deaths, state.lonely_deaths)


def finished_state(group: Group) -> FinishedState:
    return FinishedState(prompt_state(group.prompt, group.number), [sample.trajectories for sample in group.samples])


def finished_group(state: FinishedState) -> Group:
    samples = [Sample(trajectories=s, oldest=min(t.oldest_version for t in s)) for s in state.samples]
    return Group(state.prompt.number, 0, revive(state.prompt, keep_number=False), samples)


def _newest(group: Group) -> int:
    return max(int(t.versions.max()) for sample in group.samples for t in sample.trajectories)


def _copy(ledger: Ledger) -> Ledger:
    """A copy whose accounts can be changed; groups and prompts are shared."""
    same: dict[str, Any] = {name: getattr(ledger, name) for name in ("epoch", "cursor", "next_number", "again", "open")}
    return Ledger(
        ledger.size,
        ledger.seed,
        ledger.epochs,
        ledger.shuffle,
        fate={epoch: bytearray(fate) for epoch, fate in ledger.fate.items()},
        totals=Counter(ledger.totals),
        epochs_done=list(ledger.epochs_done),
        **same,
    )
