"""The ends of the roles' logs, and the line in them that says what was wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence


def log_tail(path: str | os.PathLike, lines: int = 30, nbytes: int = 65536) -> list[str]:
    """The last lines of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - nbytes))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def diagnosis(tail: Sequence[str]) -> str:
    """The line of a log's tail that most likely says what was wrong: its last error, else its last line."""
    errors = [line for line in tail if _looks_like_error(line)]
    line = (errors or [line for line in tail if line.strip()] or ["its log is empty"])[-1].strip()
    return line if len(line) < 400 else f"{line[:200]} ... {line[-200:]}"  # both ends say something


def _looks_like_error(line: str) -> bool:
    head = line.split(":", 1)[0].strip()
    return not line.startswith(" ") and ":" in line and head.replace(".", "").replace("_", "").isalnum() and (
        head.endswith(("Error", "Exception", "Died", "Refused", "Timeout")) or head.lower() in ("error", "fatal")
    )  # fmt: skip
