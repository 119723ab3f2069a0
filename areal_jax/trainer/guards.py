"""Watches the training itself: names what is wrong with a step, keeps its batch for a post-mortem, stops if told to."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from areal_jax.trainer.packing import Packed


class TrainingStopped(RuntimeError):
    """A guard ended the run; the message says why and where the batch is."""


@dataclasses.dataclass
class Guard:
    """Judges the report of every step.

    Args:
      workdir: post-mortems go to `workdir/postmortem/`; None writes none.
      action: "skip" (the update was not applied and is counted) or "stop".
      equal_rewards_limit: stop or warn after so many steps in a row in which no group's rewards differ; 0: never.
      keep: post-mortems written at most.
    """

    workdir: str | os.PathLike | None
    action: str = "skip"
    equal_rewards_limit: int = 0
    keep: int = 5
    skipped: int = 0
    written: int = 0
    equal_steps: int = 0

    def judge(self, version: int, report: dict[str, Any], packed: list[Packed]) -> str:
        """What is wrong with the step that made `version`, in words; empty if nothing is.

        Raises:
          TrainingStopped: something is, and the action is "stop".
        """
        problem = self._problem(report)
        if not problem:
            return ""
        if self.workdir is not None and self.written < self.keep:
            try:
                problem += f"; its batch is in {save_postmortem(self.workdir, version, report, packed)}"
                self.written += 1
            except OSError as error:
                problem += f"; its batch could not be kept ({error})"
        if self.action == "stop":
            raise TrainingStopped(f"step to version {version}: {problem}")
        return problem

    def _problem(self, report: dict[str, Any]) -> str:
        self.equal_steps = self.equal_steps + 1 if report.get("reward/equal_groups") == 1.0 else 0
        if updates := int(report.get("actor/skipped_updates", 0)):
            self.skipped += updates
            loss, norm = report.get("actor/loss", math.nan), report.get("actor/grad_norm", math.nan)
            if not math.isfinite(loss) or not math.isfinite(norm):
                why = "its loss or gradient is not finite"
            else:
                why = "it is beyond trainer.grad_norm_limit, ratio_limit or mismatch_limit"
            ratio, mismatch = report.get("is/max", 0.0), report.get("mismatch/logprob_abs_diff_mean", 0.0)
            what = "the update was" if updates == 1 else f"{updates} updates were"
            return (
                f"{what} not applied: {why} (loss {loss:.3g}, gradient norm {norm:.3g}, "
                f"largest importance weight {ratio:.3g}, mismatch {mismatch:.2g})"
            )
        if self.equal_rewards_limit and self.equal_steps >= self.equal_rewards_limit:
            steps, self.equal_steps = self.equal_steps, 0
            mean = report["reward/mean"]
            return (
                f"for {steps} steps all rewards of every group were equal (mean {mean:.3g}): there is nothing to learn "
                "from; look at the verifier, the answer length, and how hard the problems are"
            )
        return ""


def save_postmortem(workdir: str | os.PathLike, version: int, report: dict[str, Any], packed: list[Packed]) -> Path:
    """Writes the packed batch (`.npz`, arrays `[micro-batch, row, position]`) and the report beside it; owner-only."""
    folder = Path(workdir) / "postmortem"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"version-{version}.npz"
    arrays = {f"{i}/{name}": array for i, part in enumerate(packed) for name, array in part.arrays.items()}
    with _own(path) as file:
        np.savez_compressed(file, **arrays)
    with _own(path.with_suffix(".json")) as file:
        file.write(json.dumps({k: str(v) for k, v in report.items()}, indent=1).encode())
    return path


def _own(path: Path) -> BinaryIO:
    """A new file that only this user can read."""
    return open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb")
