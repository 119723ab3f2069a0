"""Files of lines that outlive the process which writes them."""

import os
from pathlib import Path
from typing import TextIO


def append_to(path: str | os.PathLike) -> TextIO:
    """Opens `path` for more lines; half a line at its end, of a writer that was killed, is cut off first."""
    path = Path(path)
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")
