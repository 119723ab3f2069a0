"""Where a run's numbers go: one line of JSON per step, TensorBoard, and Weights & Biases when asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from areal_jax.metrics.lines import Lines

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes to `workdir/metrics.jsonl` (flushed line by line), `workdir/tensorboard/` and, if asked, wandb.

    A resumed run appends to what is there. Scalars go everywhere; strings, lists (histograms) and dicts to the JSON
    lines only. A number that is not finite is written as a string ("nan", "inf"), so that every line stays valid JSON.
    What a full disk does not take is written later (TensorBoard's is lost): no run ends for its metrics.
    """

    def __init__(
        self, workdir: str | os.PathLike, tensorboard: bool = True, wandb: bool = False, *, name: str = "", config=None
    ):
        self._lines = Lines(os.path.join(workdir, "metrics.jsonl"))
        self._tensorboard = EventFiles(os.path.join(workdir, "tensorboard")) if tensorboard else None
        self._wandb = OnlineRun(workdir, name, config or {}) if wandb else None

    @property
    def problem(self) -> str:
        """What cannot be written just now; "" while all is well."""
        return self._lines.problem

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` of `step`: numbers, numpy or jax scalars and arrays, strings, lists, dicts."""
        values = {name: plain(value) for name, value in metrics.items()}
        self._lines.add({"step": int(step), **{k: _finite(v) for k, v in values.items()}})
        scalars = {k: v for k, v in values.items() if isinstance(v, numbers.Real)}
        if self._tensorboard is not None:
            self._tensorboard.add(int(step), scalars)
        if self._wandb is not None:
            self._wandb.add(int(step), scalars)

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class EventFiles:
    """TensorBoard's event files in `folder`, written at once and by no thread; another file follows one that failed."""

    def __init__(self, folder: str):
        self._folder, self._files, self._file = folder, 0, None

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event with all of a step's scalars; lost where the disk takes nothing."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        try:
            self._open().write_event(Event(summary=Summary(value=values), wall_time=time.time(), step=step))
            self._file.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self):
        from tensorboardX.event_file_writer import EventsWriter

        if self._file is None:
            self._files += 1
            os.makedirs(self._folder, exist_ok=True)
            prefix = os.path.join(self._folder, "events")
            self._file = EventsWriter(prefix, f".{os.getpid()}.{self._files}")
        return self._file


class OnlineRun:
    """Weights & Biases: one run there for all lives of the run in `workdir`. If it cannot start, a warning says so, and
    the run here goes on without it.

    Steps there can only grow, but an evaluation ends after the step that it is about: ours are a metric beside others.
    """

    def __init__(self, workdir: str | os.PathLike, name: str, config: Mapping[str, Any]):
        import wandb

        self._run = None
        options = {"dir": os.fspath(workdir), "id": _kept(os.path.join(workdir, "wandb.id")), "resume": "allow"}
        try:
            self._run = wandb.init(project="areal_jax", name=name or None, config=without_secrets(config), **options)
            self._run.define_metric("*", step_metric="step")
        except wandb.Error as error:
            said = " ".join(str(error).split())
            log.warning("Weights & Biases gets nothing (WANDB_MODE=offline needs no network): %s", said)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log({**scalars, "step": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` for the eyes of others: of environment variables only the names."""
    launch = {
        key: dict.fromkeys(value, "...") if key in ("env", "rollout_env", "trainer_env") else value
        for key, value in config.get("launch", {}).items()
    }
    return {**config, "launch": launch}


def _kept(path: str) -> str:
    """A name that nobody else has, the same at every start of the run."""
    with open(path, "a+", encoding="ascii") as file:
        file.seek(0)
        if not (name := file.read()):
            file.write(name := secrets.token_hex(8))
    return name


class MetricsReader:
    """Reads `workdir/metrics.jsonl` as it grows; `rows` is one dict per step, by step, of what was read so far.

    A step may have several lines (training, evaluation). Of a number that was written again after a resume, the newest
    counts. An unfinished line (the writer is at work, or was killed) is left for later; a missing file is an empty run.

    Args:
      keep: names that are kept of every line beside "step"; None: all.
    """

    def __init__(self, workdir: str | os.PathLike, keep: Iterable[str] | None = None):
        self._path, self._keep = os.path.join(workdir, "metrics.jsonl"), None if keep is None else {"step", *keep}
        self._rows: dict[int, dict[str, Any]] = {}
        self._offset = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [self._rows[step] for step in sorted(self._rows)]

    def read(self) -> list[int]:
        """Read what was appended since the last time; the steps that it is about, in the file's order."""
        if not os.path.exists(self._path):
            return []
        changed: dict[int, None] = {}
        with open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # another file: begin again
                self._rows, self._offset = {}, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with contextlib.suppress(ValueError):
                    self._take(row := json.loads(line))
                    changed[row["step"]] = None
        return list(changed)

    def _take(self, row: dict[str, Any]) -> None:
        step = row["step"]
        kept = row if self._keep is None else {name: row[name] for name in self._keep & row.keys()}
        self._rows[step] = self._rows.get(step, {}) | kept


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl` by step, one dict each, as `MetricsReader` reads them."""
    reader = MetricsReader(workdir)
    reader.read()
    return reader.rows


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
