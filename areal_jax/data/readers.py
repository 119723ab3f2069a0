"""Reads prompt data: JSONL, JSON and Parquet files, generated arithmetic, and saved Hugging Face data sets.

What is wrong with a file is said with its name and line before anything starts, or skipped and counted when asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from areal_jax.data import arithmetic
from areal_jax.data.config import DataConfig
from areal_jax.data.formats import BadRecord, Record, detect, formats


class DataError(ValueError):
    """The data cannot be used; the message is one line that names the place."""


class Dataset(Sequence):
    """Records by index, and what was left out while reading: `skipped` has one message per record."""

    def __init__(self, name: str, records: Sequence[Record], skipped: Sequence[str] = ()):
        self.name = name
        self.skipped = list(skipped)
        self._records = records
        self._last: tuple[int, Record] | None = None  # a group's samples ask for the same one in a row; it may be made

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if self._last is None or self._last[0] != index:
            self._last = index, self._records[index]
        return self._last[1]


def load_dataset(spec: str, config: DataConfig | None = None) -> Dataset:
    """The data set that `spec` names: a file (.jsonl, .json, .parquet), a folder of one, or "arithmetic:..." problems.

    Every record has "prompt" or "messages", usually "answer", and its other fields; see `areal_jax.data.formats`.
    Raises `DataError` for a missing or empty data set, and for a bad record unless `config.bad_record` is "skip".
    """
    config = config or DataConfig()
    if not spec:
        raise DataError("no data set given: set data.train to a file or to 'arithmetic:count=4096,seed=0'")
    if spec.startswith(arithmetic.PREFIX):
        try:
            return Dataset(spec, arithmetic.parse_spec(spec))
        except ValueError as error:
            raise DataError(str(error)) from None
    known = formats()
    if config.format != "auto" and config.format not in known:
        raise DataError(f"data.format '{config.format}' is unknown; it is one of auto, {', '.join(sorted(known))}")
    if not os.path.exists(spec):
        raise DataError(f"the data set '{spec}' does not exist")

    records, skipped, convert = [], [], known.get(config.format)
    for place, source in _read(spec):
        try:
            if isinstance(source, str):
                raise BadRecord(source)
            if not isinstance(source, dict):
                raise BadRecord(f"it is a {type(source).__name__}, not an object with fields")
            convert = convert or known[detect(source)]
            records.append(convert(source))
        except BadRecord as error:
            if config.bad_record != "skip":
                raise DataError(f"{place}: bad record: {error} (data.bad_record='skip' leaves it out)") from None
            skipped.append(f"{place}: {error}")
    if not records:
        why = f"; all of its {len(skipped)} records are bad" if skipped else ""
        raise DataError(f"the data set '{spec}' is empty{why}")
    return Dataset(spec, records, skipped)


def _read(path: str) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file or folder; a str instead of a record says why it cannot be read."""
    if os.path.isdir(path):
        yield from _read_folder(path)
    elif path.endswith(".jsonl"):
        yield from _read_lines(path)
    elif path.endswith(".json"):
        yield from _read_json(path)
    elif path.endswith(".parquet"):
        yield from _read_parquet(path)
    else:
        raise DataError(f"the data set '{path}' is of an unknown kind: expected .jsonl, .json or .parquet")


def _read_lines(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"not valid JSON ({error})"
    return value if not isinstance(value, str) else "it is a text, not an object with fields"


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        content = file.read()
    value = _parse(content)
    if isinstance(value, str):
        if b"\n" not in content.strip():
            raise DataError(f"{path}: {value}")
        yield from _read_lines(path)  # JSON lines under the name of JSON are common
        return
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        value = value[lists[0]] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of records, found a {type(value).__name__}")
    for number, record in enumerate(value):
        yield f"{path} record {number}", record


def _read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: bash launch/setup.sh data") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None
    number = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            yield f"{path} record {number}", record
            number += 1


def _read_folder(path: str) -> Iterator[tuple[str, Any]]:
    kinds = (".jsonl", ".json", ".parquet", ".arrow")
    files = [os.path.join(root, f) for root, _, names in os.walk(path) for f in names if f.endswith(kinds)]
    about = ("dataset_info.json", "state.json", "dataset_dict.json")
    files = sorted(f for f in files if os.path.basename(f) not in about)
    if not files:
        raise DataError(f"the folder '{path}' holds no .jsonl, .json, .parquet or .arrow file")
    for file in files:
        yield from _read_arrow(file) if file.endswith(".arrow") else _read(file)


def _read_arrow(path: str) -> Iterator[tuple[str, Any]]:
    """A file of a data set saved by Hugging Face `datasets` (`save_to_disk`, or its cache)."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: bash launch/setup.sh data") from None
    with pyarrow.memory_map(path) as source:
        number = 0
        for batch in pyarrow.ipc.open_stream(source):
            for record in batch.to_pylist():
                yield f"{path} record {number}", record
                number += 1
