"""Where versions live: in memory without a name, or in `weights/` in the run's workdir; copies pulled from another host
in a folder of this user's own in shared memory, named after the run.

A version file holds tensor bytes, each tensor starting on a multiple of 64 bytes; what they are is said by the
manifest. A reader holds a shared `flock` on the file for as long as anything maps it: the publisher writes a new
version into an old file's pages only when it can get the exclusive lock. A file in memory ends with its name: whether
its pages are still those of that version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from areal_jax.transport.messages import Manifest, TensorSpec

SHARED_MEMORY = Path("/dev/shm")
DESCRIPTORS = Path("/proc/self/fd")  # of Linux: how a file without a name is reached
PART = "part"  # a named file being written
USERS = "users"  # in a folder of pulled copies: held with a shared lock by every process that uses it
ALIGNMENT = 64  # bytes; what XLA and torch want in order to use memory in place
DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool")},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
}


class WeightsRefused(RuntimeError):
    """This version cannot be had or is not what its manifest says; whoever asked keeps the weights it has."""


def run_folder(workdir: str | os.PathLike, root: Path = SHARED_MEMORY) -> Path:
    """The run's folder in shared memory; the same for every process that is given the same workdir."""
    path = Path(workdir).resolve()
    digest = hashlib.sha256(f"{os.getuid()}:{path}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:32]
    return root / f"areal_jax-{name}-{digest}"


def make_private(folder: Path) -> Path:
    """Create `folder` for this user alone; raises `PermissionError` when it is there and somebody else's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} exists and is not a folder of this user; remove it or use another workdir")
    folder.chmod(0o700)
    return folder


def file_name(version: int, tensors: Iterable[TensorSpec]) -> str:
    """Names version and content, so that a version published again with other bytes is another file."""
    digest = 0
    for t in tensors:
        digest = zlib.crc32(f"{t.name}:{t.dtype}:{t.shape}:{t.checksum}".encode(), digest)
    return f"v{version:08d}-{digest:08x}.weights"


def check(manifest: Manifest) -> None:
    """Raise `WeightsRefused` unless every tensor's dtype is known and its bytes lie inside the file."""
    for t in manifest.tensors:
        if t.dtype not in DTYPES:
            raise WeightsRefused(f"version {manifest.version}: {t.name} has the unknown dtype {t.dtype!r}")
        if min((t.offset, *t.shape), default=0) < 0 or t.offset + tensor_bytes(t) > manifest.nbytes:
            raise WeightsRefused(
                f"version {manifest.version}: {t.name} ({t.dtype}{list(t.shape)} at byte {t.offset}) does not lie "
                f"inside its file of {manifest.nbytes} bytes"
            )


def tensor_bytes(t: TensorSpec) -> int:
    size = DTYPES[t.dtype].itemsize
    for n in t.shape:
        size *= n
    return size


def has_descriptors(shared_memory: Path) -> bool:
    """Whether versions can be in memory here."""
    return shared_memory.is_dir() and DESCRIPTORS.is_dir()


def unnamed(path: Path) -> bool:
    """Whether `path` is the descriptor of a version in memory."""
    return path.parts[:2] == ("/", "proc")


def disk_folder(workdir: str | os.PathLike) -> Path:
    return Path(workdir).resolve() / "weights"


def cleanup(workdir: str | os.PathLike, root: Path = SHARED_MEMORY, *, disk: bool = True) -> list[Path]:
    """Remove everything that a run left in this host's shared memory and, on `disk`, in `workdir/weights`; returns the
    folders removed.

    Safe at any time: processes that map a version keep it until they let go. Call it when a run has ended, or before a
    new one in the same workdir.
    """
    removed = []
    for folder in (run_folder(workdir, root), *([disk_folder(workdir)] if disk else [])):
        if folder.is_dir() and folder.lstat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def sweep(root: Path = SHARED_MEMORY) -> list[Path]:
    """Remove this user's folders of pulled copies that no living process uses: all of its users were killed."""
    removed = []
    for users in root.glob(f"areal_jax-*/{USERS}"):
        with contextlib.suppress(OSError), open(os.open(users, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
            if users.parent.lstat().st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(users.parent, ignore_errors=True)
                removed.append(users.parent)
    return removed
