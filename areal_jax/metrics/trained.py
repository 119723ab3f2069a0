"""What a run was trained on: `WORKDIR/trained.jsonl`, one line per training step, written by the trainer itself.

It is the account that can be checked from outside: every prompt of every epoch once, none beyond its age.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from areal_jax.metrics.lines import Lines


class TrainedGroup(NamedTuple):
    """One prompt's samples in a training step."""

    epoch: int
    record: int  # its number in the training data
    group: int  # submission number
    samples: int
    oldest: int  # version among its sampled tokens
    digest: int = 0  # CRC-32 of all that was sampled: where two are equal, so are the samples, bit for bit


class Group(Protocol):
    """What is read of a `GroupResult`."""

    group: int
    epoch: int
    record_index: int
    samples: list
    oldest_version: int


class TrainedWriter:
    """Appends to the file in `workdir`; every line is on its way to the disk when `write` returns."""

    def __init__(self, workdir: str | os.PathLike):
        self._lines = Lines(Path(workdir) / "trained.jsonl")

    def write(self, version: int, groups: Sequence[Group]) -> None:
        """The step from `version` to `version + 1` was made with these groups. Raises `OSError`: nothing is written."""
        rows = [
            TrainedGroup(g.epoch, g.record_index, g.group, len(g.samples), g.oldest_version, _digest(g)) for g in groups
        ]
        self._lines.append({"version": version, "groups": rows})

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> TrainedWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_trained(workdir: str | os.PathLike) -> dict[int, list[TrainedGroup]]:
    """The groups of every step that counts, by version, in order; empty without the file.

    A trainer that went back to a checkpoint makes steps again: what it had written of them, and of later ones, is
    void, as those updates are.
    """
    steps: dict[int, list[TrainedGroup]] = {}
    try:
        lines = (Path(workdir) / "trained.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return steps
    for line in lines:
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        for version in [version for version in steps if version >= row["version"]]:
            del steps[version]
        steps[row["version"]] = [TrainedGroup(*group) for group in row["groups"]]
    return steps


def last_trained(workdir: str | os.PathLike) -> int:
    """The version of the step that was written last; -1 without one, or where it cannot be read."""
    last = b""
    try:
        with open(Path(workdir) / "trained.jsonl", "rb") as file:
            for line in file:
                last = line if line.endswith(b"\n") else last
        return int(json.loads(last)["version"]) if last else -1
    except (OSError, ValueError):
        return -1


def _digest(group: Group) -> int:
    digest = 0
    for trajectory in (trajectory for sample in group.samples for trajectory in sample):
        for array in (trajectory.tokens, trajectory.logprobs, trajectory.versions, np.float64(trajectory.reward)):
            digest = zlib.crc32(array.tobytes(), digest)
    return digest
