"""Processes that nothing was heard of for too long, as files that whoever started them looks for.

A process that hangs does not end by itself, so its death is not noticed where processes are watched. The controller
writes `WORKDIR/silent/NAME` of a worker, the trainer that of the controller; the supervisor of that host kills the
process, and starts another as after any death.
"""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec

from areal_jax.disk import write_whole


class Silence(msgspec.Struct, frozen=True):
    """Process `pid` of `host`, taken for dead after so many seconds without a word; `phase` was its last.

    With pid 0 it is whichever process had the name in all those seconds: who waits for a server does not know more.
    """

    host: str
    pid: int
    seconds: float
    phase: str
    by: str = "the controller"  # who waited


def report_silence(workdir: str | Path, name: str, silence: Silence) -> None:
    """Say that role `name` has not been heard of; the report appears as a whole."""
    folder = Path(workdir) / "silent"
    folder.mkdir(exist_ok=True, mode=0o700)
    write_whole(folder / name, msgspec.json.encode(silence))


def take_silence(workdir: str | Path, name: str) -> Silence | None:
    """The report about role `name`, which is removed; None without one."""
    path = Path(workdir) / "silent" / name
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Silence)
    except msgspec.MsgspecError:
        found = None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second: of NFS, while another host replaces it
            raise
        return None
    path.unlink(missing_ok=True)
    return found
