"""What a run has really trained on, written down beside its trainer and held against the ledger in its checkpoint.

A whole run with the record, in place of `python -m areal_jax.launch`:

    python tools/accounts.py launch --config=configs/quickstart.py --workdir=runs/x

Each batch becomes one line of WORKDIR/trained.jsonl before it is trained on. A trainer that goes back to a checkpoint
takes steps again: the last line of a step is the one that counts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Trained:
    """One batch, as it was given to the training step."""

    version: int
    at: float  # seconds since the epoch
    groups: list[list[int]]  # [group number, epoch, record, samples, oldest version among the tokens, digest of all]


def read(workdir: Path) -> list[Trained]:
    """All lines so far; a last one that a kill has cut off was not trained on."""
    path = workdir / "trained.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [Trained(**json.loads(line)) for line in whole]


def kept(lines: list[Trained], steps: int) -> list[Trained]:
    """Of each of the first `steps` steps the batch that counts: those of a timeline that was given up are left out."""
    last = {line.version: line for line in lines}
    return [last[version] for version in sorted(last) if version < steps]


def problems(lines: list[Trained], ledger: Any, *, steps: int, bound: int, group_size: int) -> list[str]:
    """Everything that is wrong with the accounts after `steps` steps, in words.

    `ledger` is the controller's state in the checkpoint of that step (`controller.snapshot.decode`).
    """
    from areal_jax.controller.ledger import CONSUMED, OPEN

    timeline, found = kept(lines, steps), []
    if missing := set(range(steps)) - {batch.version for batch in timeline}:
        found.append(f"no batch is known for steps {sorted(missing)[:10]}")
    times = Counter((epoch, record) for batch in timeline for _, epoch, record, *_ in batch.groups)
    found += [f"record {i} of epoch {epoch} was trained on {n} times" for (epoch, i), n in times.items() if n > 1]
    for batch in timeline:
        for number, _, _, samples, oldest, _ in batch.groups:
            if not 0 <= batch.version - oldest <= bound:
                found.append(f"step {batch.version} trained on version {oldest} (group {number}); the bound is {bound}")
            if samples != group_size:
                found.append(f"step {batch.version} trained on {samples} of {group_size} samples of group {number}")
    accounts = ledger.ledger
    by_epoch: dict[int, set[int]] = {}
    for epoch, record in times:
        by_epoch.setdefault(epoch, set()).add(record)
    for done in accounts.epochs_done:
        trained, ended = len(by_epoch.get(done["epoch"], ())), sum(done.get(k, 0) for k in ENDS)
        if trained != done.get("consumed", 0) or ended != done["prompts"]:
            found.append(f"epoch {done['epoch']}: {trained} prompts were trained on; the ledger says {done}")
    waiting = [*accounts.again, *ledger.inflight, *(group.prompt for group in ledger.finished)]
    held = Counter((prompt.epoch, prompt.index) for prompt in waiting)
    for epoch, fate in accounts.fate.items():
        trained = {record for record in range(len(fate)) if fate[record] == CONSUMED}
        drawn = {(epoch, record) for record in range(len(fate)) if fate[record] == OPEN}
        if differ := sorted(trained ^ by_epoch.get(epoch, set())):
            found.append(f"epoch {epoch}: the ledger and the trainer differ on records {differ[:10]}")
        if lost := sorted(drawn - set(held)):
            found.append(f"lost, neither trained on nor waiting: {lost[:10]}")
    found += [f"record {record} of epoch {epoch} waits {n} times" for (epoch, record), n in held.items() if n > 1]
    found += [f"record {record} of epoch {epoch} waits, and was trained on" for epoch, record in set(held) & set(times)]
    return found


ENDS = ("consumed", "filtered", "quarantined")


def newest_state(workdir: Path) -> Any:
    """The controller's state in the newest checkpoint (`controller.snapshot.CoreState`)."""
    from areal_jax.controller.snapshot import decode
    from areal_jax.trainer.checkpoint import read_controller

    return decode(read_controller(workdir / "checkpoints"))


# --- The recording roles ------------------------------------------------------------------------------------------


def launch(arguments: list[str]) -> int:
    """The launcher, with a trainer that records."""
    from areal_jax.launch import __main__ as program
    from areal_jax.launch import session

    roles_of = session.roles_of

    def recorded(config, workdir):
        roles, leaders = roles_of(config, workdir)
        for i, role in enumerate(roles):
            if role.name in leaders:
                command = (role.command[0], str(Path(__file__).resolve()), "trainer", *role.command[3:])
                roles[i] = dataclasses.replace(role, command=command)
        return roles, leaders

    session.roles_of = recorded
    return program.main(arguments)


def row(group: Any) -> list[int]:
    """What `Trained.groups` keeps of a `GroupResult`."""
    trajectories = [t for sample in group.samples for t in sample]
    digest = 0
    for t in trajectories:
        for part in (t.tokens, t.logprobs, t.versions, np.float64(t.reward)):
            digest = zlib.crc32(np.ascontiguousarray(part).tobytes(), digest)
    oldest = min(t.oldest_version for t in trajectories)
    return [group.group, group.epoch, group.record_index, len(group.samples), oldest, digest]


def trainer(arguments: list[str]) -> int:
    """The trainer's program, with a record of what it trains on."""
    from areal_jax.trainer import __main__ as program
    from areal_jax.trainer import loop

    path = Path(arguments[arguments.index("--workdir") + 1]) / "trained.jsonl"
    make_batch = loop.make_batch
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_text(path.read_text().rpartition("\n")[0] + "\n")  # cut off by a kill

    def recorded(groups, version, *others, **options):
        with path.open("a") as file:
            rows = [row(group) for group in groups]
            file.write(json.dumps({"version": version, "at": time.time(), "groups": rows}) + "\n")
        return make_batch(groups, version, *others, **options)

    loop.make_batch = recorded
    return program.main(arguments)


if __name__ == "__main__":
    sys.exit({"launch": launch, "trainer": trainer}[sys.argv[1]](sys.argv[2:]))
