"""Temporary folders of processes that may be killed before they clean up: who comes later removes what nobody holds."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PREFIX, _MARKER = "areal-jax-", ".areal-jax-verifier"  # of the folders' names; a file in each of them
REMOVE_SECONDS = 60.0  # for each of two programs; what is left then is for whoever comes later


def make_folder(kind: str = "verifier") -> tuple[str, int]:
    """A temporary folder, and the descriptor that holds it against `sweep_folders` while this process lives.

    Raises `OSError`: then there is neither.
    """
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-")
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        Path(folder, _MARKER).touch()  # not before it is locked: without the marker it is not swept
    except OSError:  # a full disk, say; whoever asks may ask again and again
        if descriptor >= 0:
            os.close(descriptor)
        os.rmdir(folder)
        raise
    return folder, descriptor


def sweep_folders() -> None:
    """Removes this user's folders whose owner was killed: nobody holds them any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.stat(_MARKER, dir_fd=descriptor, follow_symlinks=False)  # else it is not one of ours
                    remove_folder(str(path))
            finally:
                os.close(descriptor)


def remove_folder(path: str) -> None:
    """Removes a folder that a verifier or a program under test has filled, however deep, and whatever it hides."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)
    # rmtree takes a frame and a descriptor for every level, and leaves what it may not enter; these programs do not.
    for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]) if os.path.isdir(path) else ():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": REMOVE_SECONDS}
            subprocess.run([*command, "--", path], check=False, **quiet)
