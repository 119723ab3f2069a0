"""What a controller leaves on disk while it works, so that the next one can take over when it is killed.

`WORKDIR/controller/groups/NUMBER` holds a finished group from the moment it is finished until it is trained on for
good; `WORKDIR/controller/ledger` holds everything else and is small. It is written before a batch or the
acknowledgement of a version leaves the controller, and about once a second otherwise. The folder is removed when the
run is over.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from areal_jax.controller.ledger import Group, Prompt, Sample
from areal_jax.controller.snapshot import (
    LedgerState,
    PromptState,
    StateError,
    decode_finished,
    describe,
    encode,
    finished_group,
    finished_state,
    prompt_state,
    rebuild,
    revive,
)
from areal_jax.disk import write_whole
from areal_jax.transport.messages import Batch, EvaluationResult, Manifest

if TYPE_CHECKING:
    from areal_jax.controller.core import Core

FORMAT = 1


class OpenState(msgspec.Struct, frozen=True, array_like=True):
    prompt: PromptState
    position: int
    samples: list[tuple[int, str, int]]  # attempt, worker ("" for none), version of its weights


class HandedState(msgspec.Struct, frozen=True, array_like=True):
    version: int
    prompts: list[PromptState]
    report: dict[str, float]


class JournalState(msgspec.Struct, frozen=True):
    format: int
    version: int
    next_batch: int
    lives: int
    manifest: Manifest | None
    ledger: LedgerState
    open: list[OpenState]
    finished: list[PromptState]
    handed: list[HandedState]
    evaluations: list[EvaluationResult]
    telemetry: dict[str, dict[str, float]]


_decoder = msgspec.msgpack.Decoder(JournalState)


class Journal:
    """The journal in `workdir`. Raises `OSError`, with the file's name, when the disk does: a controller without it
    could lose samples. What was written before is whole then, and all may be called again."""

    def __init__(self, workdir: str | Path):
        self.folder = Path(workdir) / "controller"
        self._groups = self.folder / "groups"
        self._groups.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        self._lives = 0
        for draft in (*self.folder.glob(".*"), *self._groups.glob(".*")):  # of a controller killed while it wrote
            draft.unlink()
        self._spooled = {int(path.name) for path in self._groups.iterdir() if path.name.isdigit()}

    def spool(self, group: Group) -> None:
        """Keep finished `group`, whatever happens to this process."""
        self._write(self._groups / str(group.number), encode(finished_state(group)))
        self._spooled.add(group.number)

    def write(self, core: Core) -> None:
        """Keep the state of `core`, and forget groups that are trained on or dropped."""
        if core.lives != self._lives:  # what was finished before the run went back must not come back
            self._sweep(core)
            self._lives = core.lives
        self._write(self.folder / "ledger", encode(_state(core)))
        self._sweep(core)

    def _sweep(self, core: Core) -> None:
        needed = set(core.buffer.groups)
        needed.update(group.number for groups in core.handed_groups.values() for group in groups)
        for number in self._spooled - needed:
            (self._groups / str(number)).unlink(missing_ok=True)
        self._spooled &= needed

    def _write(self, path: Path, data: bytes) -> None:
        write_whole(path, data, mode=0o600)

    def remove(self) -> None:
        """The run is over: nobody will take over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def recover(self, core: Core, now: float) -> bool:
        """Make a new `core` go on where the last controller was killed; False when there was none.

        Samples that workers still run stay theirs if they say so within three heartbeats. Raises `StateError` for a
        journal of another run.
        """
        try:
            state = _decoder.decode((self.folder / "ledger").read_bytes())
        except FileNotFoundError:
            return False
        except msgspec.MsgspecError as error:
            raise StateError(f"{self.folder / 'ledger'} does not decode ({error}): remove {self.folder}") from None
        if state.format != FORMAT:
            raise StateError(f"{self.folder} has format {state.format}, not {FORMAT}: remove it")
        core.ledger = ledger = rebuild(core, state.ledger)
        core.version, core.next_batch, core.manifest = state.version, state.next_batch, state.manifest
        core.lives = self._lives = state.lives
        core.telemetry.load(state.telemetry)
        core.evaluations.results = {result.version: result for result in state.evaluations}
        lost: list[Prompt] = []
        for handed in sorted(state.handed, key=lambda handed: handed.version):
            groups = [self._finished(prompt) for prompt in handed.prompts]
            if None in groups or handed.version > core.next_batch:
                core.next_batch = min(core.next_batch, handed.version)
                lost += self._keep(core, handed.prompts, groups)
                continue
            core.handed_groups[handed.version] = groups
            results = [group.result() for group in groups]
            core.handed[handed.version] = Batch(version=handed.version, groups=results, report=handed.report)
        lost += self._keep(core, state.finished, [self._finished(prompt) for prompt in state.finished])
        ledger.again.extendleft(sorted(lost, key=lambda prompt: -prompt.number))
        patience = now + 3 * core.config.heartbeat_seconds
        for entry in state.open:
            if group := self._finished(entry.prompt):  # finished after the ledger was written
                core.buffer.add(group)
                continue
            samples = [
                Sample(attempt=attempt, claim=(name, weights) if name else None, not_before=patience if name else 0.0)
                for attempt, name, weights in entry.samples
            ]
            number = entry.prompt.number
            ledger.open[number] = Group(number, entry.position, revive(entry.prompt, keep_number=False), samples)
            ledger.queued.update((number, i) for i in range(len(samples)))
        return True

    def _finished(self, prompt: PromptState) -> Group | None:
        try:
            state = decode_finished((self._groups / str(prompt.number)).read_bytes())
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        if (state.prompt.number, state.prompt.epoch, state.prompt.index) != (prompt.number, prompt.epoch, prompt.index):
            return None  # of a former life
        return finished_group(state)

    def _keep(self, core: Core, prompts: list[PromptState], groups: list[Group | None]) -> list[Prompt]:
        """What is there goes to the buffer; returns what is not there, to be generated again."""
        for group in groups:
            if group is not None:
                core.buffer.add(group)
        return [revive(prompt) for prompt, group in zip(prompts, groups, strict=True) if group is None]


def _state(core: Core) -> JournalState:
    return JournalState(
        format=FORMAT,
        version=core.version,
        next_batch=core.next_batch,
        lives=core.lives,
        manifest=core.manifest,
        ledger=describe(core, core.ledger, core.counters, core.telemetry.lags, core.telemetry.token_lags),
        open=[
            OpenState(
                prompt_state(group.prompt, group.number),
                group.position,
                [(sample.attempt, sample.worker or "", sample.weights) for sample in group.samples],
            )
            for group in core.ledger.open.values()
        ],
        finished=[prompt_state(group.prompt, group.number) for group in core.buffer.groups.values()],
        handed=[
            HandedState(version, [prompt_state(g.prompt, g.number) for g in groups], core.handed[version].report)
            for version, groups in core.handed_groups.items()
        ],
        evaluations=[r for r in core.evaluations.results.values() if isinstance(r, EvaluationResult)],
        telemetry=core.telemetry.save(),
    )
