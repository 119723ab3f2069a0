"""Where a run's numbers go: one line of JSON per step, TensorBoard, and Weights & Biases when asked for."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


class MetricsWriter:
    """Writes to `workdir/metrics.jsonl` (flushed line by line), `workdir/tensorboard/` and, if asked, wandb.

    A resumed run appends to what is there. Scalars go everywhere; strings, lists (histograms) and dicts to the JSON
    lines only. A number that is not finite is written as a string ("nan", "inf"), so that every line stays valid JSON.
    """

    def __init__(
        self, workdir: str | os.PathLike, tensorboard: bool = True, wandb: bool = False, *, name: str = "", config=None
    ):
        os.makedirs(workdir, exist_ok=True)
        self._file = open(os.path.join(workdir, "metrics.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
        if _cut_off(self._file.name):  # by a kill, or a full disk
            self._file.write("\n")
        self._tensorboard = self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(os.path.join(workdir, "tensorboard"), flush_secs=10)
        if wandb:
            import wandb as wandb_module

            self._wandb = wandb_module.init(project="areal_jax", name=name or None, dir=workdir, config=config)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` of `step`: numbers, numpy or jax scalars and arrays, strings, lists, dicts."""
        values = {name: plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": int(step), **{k: _finite(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        scalars = {k: v for k, v in values.items() if isinstance(v, numbers.Real)}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, int(step))
        if self._wandb is not None:
            self._wandb.log(scalars, step=int(step))

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl` by step, one dict each: a step may have several (training, evaluation).

    Of a number that was written again after a resume, the newest counts. An unfinished line (the writer is at work, or
    was killed) is left out; a missing file is an empty run.
    """
    path, rows = os.path.join(workdir, "metrics.jsonl"), {}
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _cut_off(path: str) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy and jax scalars and arrays become numbers and lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
