"""A host's own copy of a version that comes from another: made once, in shared memory, for all workers of the host.

The first worker that needs it takes a lock and fills the file, the others wait and map the same one. What was already
there when the connection (or whoever filled it) died is kept: the next one goes on from there.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from areal_jax.transport.messages import Manifest
from areal_jax.weights import store
from areal_jax.weights.store import WeightsRefused

_CHUNK = 4 << 20


def copy_of(manifest: Manifest, folder: Path, fill: Callable[[IO[bytes]], None], *, timeout: float) -> Path:
    """This host's copy of a version, made unless it is there; its checksums are the caller's to compare.

    The last process of this host that uses `folder` removes it when it exits.

    Args:
      folder: where this host keeps its copies (`store.run_folder`); two newest are kept.
      fill: appends what is missing to the file that it is given.
      timeout: seconds without any progress by whoever else fills the file, after which `WeightsRefused` is raised; so
        it is, too, where there is no room.
    """
    _use(folder)
    path = folder / store.file_name(manifest.version, manifest.tensors)
    with _only_one(folder / "pulling", path, timeout) as must:
        if must:
            part = path.with_suffix(".part")
            for stale in folder.glob("*.part"):
                if stale != part:
                    stale.unlink()
            try:
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
                    file.seek(0, os.SEEK_END)
                    fill(file)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                part.unlink(missing_ok=True)
                free = shutil.disk_usage(folder).free
                raise WeightsRefused(
                    f"version {manifest.version} has {manifest.nbytes / 1e9:.1f} GB, and {folder.parent} room for "
                    f"{free / 1e9:.1f} (in all three versions are needed): make it larger (mount -o remount,size=...; "
                    f"a container's --shm-size)"
                ) from None
            part.replace(path)
            for old in sorted(folder.glob("v*.weights"))[:-2]:
                if old != path:
                    old.unlink()
    return path


def from_disk(manifest: Manifest, source: Path, folder: Path, *, timeout: float) -> Path:
    """A copy of a file on a disk that several hosts share. Mapped itself, it could be gone in the middle of a load: the
    publisher removes it after two more versions, and NFS then kills whoever touches a page."""

    def fill(file: IO[bytes]) -> None:
        try:
            with open(source, "rb") as whole:
                whole.seek(file.tell())
                shutil.copyfileobj(whole, file, _CHUNK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            gone = f"version {manifest.version} is gone: {source} has been replaced by a newer version"
            raise WeightsRefused(gone) from None
        if file.tell() < manifest.nbytes:
            raise WeightsRefused(
                f"version {manifest.version}: {source} shows {file.tell()} of {manifest.nbytes} bytes on this host"
            )

    return copy_of(manifest, folder, fill, timeout=timeout)


_used: dict[Path, IO[bytes]] = {}  # folders that this process pulls into, each with a file that it has locked


def _use(folder: Path) -> None:
    """Make the folder, and see to its removal by the last process that uses it; if that is killed, by the next pull of
    any run on this host."""
    if folder in _used and folder.exists():
        return
    store.sweep(folder.parent)
    while True:
        with contextlib.suppress(FileNotFoundError):  # swept away before the lock was ours
            users = store.make_private(folder) / store.USERS
            _used[folder] = users.open("wb")  # open for as long as this process lives
            fcntl.flock(_used[folder], fcntl.LOCK_SH)
            if users.stat().st_ino == os.fstat(_used[folder].fileno()).st_ino:
                break

    @atexit.register
    def leave() -> None:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(_used[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _only_one(lock: Path, path: Path, timeout: float):
    """Whether the caller must pull `path`: False once somebody else on this host has."""
    deadline, size = time.monotonic() + timeout, -1
    with open(lock, "wb") as file:
        while not path.exists():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            grown = 0
            with contextlib.suppress(FileNotFoundError):  # it is not begun, or has just become `path`
                grown = path.with_suffix(".part").stat().st_size
            if grown != size:
                deadline, size = time.monotonic() + timeout, grown
            if time.monotonic() > deadline:
                raise WeightsRefused(f"{path.name}: another process of this host pulls it, without progress")
            time.sleep(0.02)
        yield not path.exists()
