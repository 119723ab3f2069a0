"""Processes that the controller has heard nothing of for too long, as files that whoever started them looks for.

A process that hangs does not end by itself, so its death is not noticed where processes are watched. The controller
writes `WORKDIR/silent/NAME`; the supervisor of that host kills the process, and starts another as after any death.
"""

from __future__ import annotations

from pathlib import Path

import msgspec


class Silence(msgspec.Struct, frozen=True):
    """Process `pid` of `host`, taken for dead after so many seconds without a word; `phase` was its last."""

    host: str
    pid: int
    seconds: float
    phase: str


def report_silence(workdir: str | Path, name: str, silence: Silence) -> None:
    """Say that role `name` has not been heard of; the report appears as a whole."""
    folder = Path(workdir) / "silent"
    folder.mkdir(exist_ok=True, mode=0o700)
    draft = folder / f".{name}"
    draft.write_bytes(msgspec.json.encode(silence))
    draft.replace(folder / name)


def take_silence(workdir: str | Path, name: str) -> Silence | None:
    """The report about role `name`, which is removed; None without one."""
    path = Path(workdir) / "silent" / name
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Silence)
    except (FileNotFoundError, msgspec.MsgspecError):
        found = None
    path.unlink(missing_ok=True)
    return found
