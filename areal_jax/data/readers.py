"""Reads prompt data: JSONL, JSON and Parquet files, folders as on the Hugging Face hub, and generated arithmetic.

What is wrong with a file is said with its name and line before anything starts, or skipped and counted when asked.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from areal_jax.data import arithmetic
from areal_jax.data.config import DataConfig
from areal_jax.data.formats import BadRecord, Record, detect, formats

KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # not records
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
_SAME_SPLIT = dict.fromkeys(("valid", "val", "dev"), "validation")


class DataError(ValueError):
    """The data cannot be used; the message is one line that names the place."""


class Dataset(Sequence):
    """Records by index, and what was left out while reading: `skipped` has one message per record.

    `places` says where each record stands (file and line), where that is known.
    """

    def __init__(self, name: str, records: Sequence[Record], skipped: Sequence[str] = (), places: Sequence[str] = ()):
        self.name = name
        self.skipped = list(skipped)
        self._records, self._places = records, places
        self._last: tuple[int, Record] | None = None  # a group's samples ask for the same one in a row; it may be made

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if self._last is None or self._last[0] != index:
            self._last = index, self._records[index]
        return self._last[1]

    def place(self, index: int) -> str:
        """Where record `index` stands."""
        return self._places[index] if self._places else f"{self.name} record {index}"

    def only(self, indices: Sequence[int], skipped: Sequence[str] = ()) -> Dataset:
        """The records at `indices`; `skipped` says of the others why they are left out."""
        chosen = [self._records[i] for i in indices], [*self.skipped, *skipped], [self.place(i) for i in indices]
        return Dataset(self.name, *chosen)

    def first(self, count: int) -> Dataset:
        """The first `count` records; all of them with 0."""
        return self.only(range(min(count, len(self)) if count > 0 else len(self)))

    @property
    def left_out(self) -> str:
        """How many records were left out, and the first of them, in one line; empty if none was."""
        if not self.skipped:
            return ""
        which = "1 record is" if len(self.skipped) == 1 else f"{len(self.skipped):,} records are"
        return f"{which} left out, {len(self):,} are used; the first left out: {self.skipped[0]}"


def load_dataset(
    spec: str, config: DataConfig | None = None, check: Callable[[Record], None] = lambda record: None
) -> Dataset:
    """The data set that `spec` names: a file, a folder of files, one split of it ("FOLDER:train"), or "arithmetic:...".

    Every record has "prompt" or "messages", usually "answer", and its other fields; see `areal_jax.data.formats`.
    `check` raises `BadRecord` for what the reader of the records cannot use (`areal_jax.rewards.loading.record_check`).
    Raises `DataError` for a missing or empty data set, and for a bad record unless `config.bad_record` is "skip".
    """
    config = config or DataConfig()
    if not spec:
        raise DataError("no data set given: set data.train to a file or to 'arithmetic:count=4096,seed=0'")
    if spec.startswith(arithmetic.PREFIX):
        try:
            problems = arithmetic.parse_spec(spec)
            check(problems[0])  # all have the same fields
            return Dataset(spec, problems)
        except ValueError as error:
            raise DataError(str(error)) from None
    known = formats()
    if config.format != "auto" and config.format not in known:
        raise DataError(f"data.format '{config.format}' is unknown; it is one of auto, {', '.join(sorted(known))}")
    path, split = _path_and_split(spec)
    records, skipped, places = [], [], []
    convert = known.get("prompt_answer" if config.fields and config.format == "auto" else config.format)
    for place, source in _read(path, split):
        try:
            if isinstance(source, str):
                raise BadRecord(source)
            if not isinstance(source, dict):
                raise BadRecord(f"it is a {type(source).__name__}, not an object with fields")
            source = source | {name: _dig(source, str(where)) for name, where in config.fields.items()}
            convert = convert or known[detect(source)]
            record = convert(source)
            _check_sendable(record)
            check(record)
            records.append(record)
            places.append(place)
        except BadRecord as error:
            if config.bad_record != "skip":
                raise DataError(f"{place}: bad record: {error} (data.bad_record='skip' leaves it out)") from None
            skipped.append(f"{place}: {error}")
    if not records:
        why = f"; all of its {len(skipped)} records are bad, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"the data set '{spec}' is empty{why}")
    return Dataset(spec, records, skipped, places)


def _check_sendable(record: Record) -> None:
    """Raises `BadRecord` for what no message can carry: an integer above 64 bits, half a surrogate pair in a text."""
    for name, value in record.items():
        try:
            msgspec.msgpack.encode({name: value})
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            raise BadRecord(f"its {name!r} cannot be sent to a worker ({error}); write it as text") from None


def _path_and_split(spec: str) -> tuple[str, str]:
    """("data/gsm8k", "train") of "data/gsm8k:train"; the split is empty where none is named."""
    if os.path.exists(spec):
        return spec, ""
    path, colon, split = spec.rpartition(":")
    if colon and os.path.isdir(path):
        return path, _SAME_SPLIT.get(split, split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        hint = f" (if it is one of the Hugging Face hub: hf download --repo-type dataset {spec} --local-dir FOLDER)"
        raise DataError(f"the data set '{spec}' does not exist{hint}")
    raise DataError(f"the data set '{spec}' does not exist")


def _dig(source: Mapping[str, Any], where: str) -> Any:
    """The value at `where`, keys and indices joined by dots: "reward_model.ground_truth", "answers.0"."""
    value: Any = source
    try:
        for key in where.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (LookupError, TypeError, ValueError):
        raise BadRecord(f"it has no '{where}' (its fields: {sorted(source)})") from None
    return value


def _read(path: str, split: str = "") -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file or folder; a str instead of a record says why it cannot be read."""
    if os.path.isdir(path):
        for file in _files(path, split):
            yield from _read(file)
        return
    try:
        yield from _reader_of(path)(path)
    except (OSError, EOFError, zlib.error) as error:  # no permission; a download that broke off, or is no gzip
        raise DataError(f"the data set '{path}' cannot be read: {error}") from None


def _reader_of(path: str) -> Callable[[str], Iterator[tuple[str, Any]]]:
    if path.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines
    if path.endswith((".json", ".json.gz")):
        return _read_json
    if path.endswith(".parquet"):
        return _read_parquet
    if path.endswith(".arrow"):
        return _read_arrow
    raise DataError(f"the data set '{path}' is of an unknown kind: expected one of {', '.join(KINDS)}")


def _files(folder: str, split: str) -> list[str]:
    """The data files in `folder` that belong to `split`, by their names; they may be of one split only if it is "".

    What stands before the split in a path is a configuration ("main/train-..."), and there may be one only.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(KINDS) and name not in _ABOUT:
                path = os.path.join(root, name)
                where = os.path.relpath(path, folder)
                last = max(_SPLIT.finditer(where.lower()), key=re.Match.start, default=None)
                word, before = (last[0], where[: last.start()]) if last else ("train", "")  # as the hub has it
                found.setdefault(_SAME_SPLIT.get(word, word), []).append((os.path.dirname(before), path))
    if not found:
        raise DataError(f"the folder '{folder}' holds no file of the kinds {', '.join(KINDS)}")
    if split and split not in found:
        raise DataError(f"the folder '{folder}' has no split '{split}'; it has {', '.join(sorted(found))}")
    if not split and len(found) > 1:
        several = ", ".join(sorted(found))
        raise DataError(f"the folder '{folder}' holds several splits ({several}): name one, as in '{folder}:train'")
    chosen = found[split or next(iter(found))]
    if len(configurations := {configuration for configuration, _ in chosen}) > 1:
        several = ", ".join(sorted(configurations))
        one = os.path.join(folder, max(configurations)) + (f":{split}" if split else "")
        raise DataError(f"the folder '{folder}' holds several configurations ({several}): name one, as in '{one}'")
    return sorted(path for _, path in chosen)


def _open(path: str) -> Any:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _read_lines(path: str) -> Iterator[tuple[str, Any]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        return f"not valid JSON ({error})"
    return value if not isinstance(value, str) else "it is a text, not an object with fields"


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
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
