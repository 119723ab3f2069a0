"""Finds one version's bytes, checks them, and maps them: no copy is made.

Nothing is handed out before every checksum is right, so a receiver that starts loading will not have to stop half-way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import mmap
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from areal_jax.transport.endpoints import is_loopback, load_keys
from areal_jax.transport.messages import Manifest, TensorSpec
from areal_jax.weights import store
from areal_jax.weights.copies import from_disk
from areal_jax.weights.store import WeightsRefused
from areal_jax.weights.tcp import pull

_CHUNK = 4 << 20


def open_version(
    manifest: Manifest,
    *,
    workdir: str | os.PathLike | None = None,
    timeout: float = 120.0,
    verify: bool = True,
    host: str | None = None,
    shared_memory: Path = store.SHARED_MEMORY,
) -> OpenVersion:
    """Map one version. Use it in a `with` block, or keep it for as long as its arrays are used.

    Args:
      workdir: the run's folder; needed between hosts, where it names this host's copies and holds the keys.
      timeout: seconds without progress to wait for bytes that are still on their way.
      verify: compare every tensor's checksum before returning.
      host: this host's name; elsewhere than on the manifest's host its shared memory is not looked for.
      shared_memory: the memory file system of this host.

    Raises `WeightsRefused` when the version is gone, does not arrive in time, or is not what the manifest says.
    """
    store.check(manifest)
    start = time.perf_counter()
    here, path = host or socket.gethostname(), Path(manifest.path)
    if manifest.transport == "disk":
        _wait_for(path, manifest, timeout)
        if here != manifest.host and workdir is not None:
            path = from_disk(manifest, path, store.run_folder(workdir, shared_memory), timeout=timeout)
    elif here != manifest.host or not os.path.exists(path):  # its publisher has died, or is another user's
        path = _pull(manifest, here, workdir, timeout, shared_memory)
    version = OpenVersion(manifest, path)
    version.timings["read"] = time.perf_counter() - start
    if verify:
        try:
            version.verify()
        except BaseException:
            version.close()
            if path != Path(manifest.path):
                path.unlink(missing_ok=True)  # the next attempt pulls it anew
            raise
    return version


class OpenVersion:
    """One mapped version: iterate for (name, array), or index by name. Arrays are read-only views of the file.

    The file's pages are not used for another version before this is closed *and* its arrays are gone.
    """

    def __init__(self, manifest: Manifest, path: Path):
        self.manifest = manifest
        self.path = path
        self.version = manifest.version
        self.timings: dict[str, float] = {}
        self._specs = {t.name: t for t in manifest.tensors}
        self._map, self.identity = _map(manifest, path)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for t in self.manifest.tensors:
            yield t.name, self._array(t)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._array(self._specs[name])

    def __len__(self) -> int:
        return len(self._specs)

    def verify(self) -> None:
        """Compare all checksums, in threads; raises `WeightsRefused` naming the tensor that is wrong."""
        start = time.perf_counter()
        largest_first = sorted(self.manifest.tensors, key=store.tensor_bytes, reverse=True)
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "verify") as threads:
            for t, right in zip(largest_first, threads.map(self._matches, largest_first), strict=True):
                if not right:
                    raise WeightsRefused(
                        f"version {self.version}: the bytes of {t.name} do not match their checksum ({self.path})"
                    )
        self.timings["verify"] = time.perf_counter() - start

    def close(self) -> None:
        """Let go of the file; arrays that are still referred to stay valid and keep it."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> OpenVersion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _array(self, t: TensorSpec) -> np.ndarray:
        size = store.tensor_bytes(t)
        raw = np.frombuffer(self._map, np.uint8, size, t.offset) if size else np.empty(0, np.uint8)
        return raw.view(store.DTYPES[t.dtype]).reshape(t.shape)

    def _matches(self, t: TensorSpec) -> bool:
        checksum, end = 0, t.offset + store.tensor_bytes(t)
        with memoryview(self._map) as data:
            for start in range(t.offset, end, _CHUNK):
                with data[start : min(start + _CHUNK, end)] as chunk:
                    checksum = zlib.crc32(chunk, checksum)
        return checksum == t.checksum


def same_layout(a: Manifest, b: Manifest) -> None:
    """Raise `WeightsRefused` unless both have the same tensors: names, dtypes and shapes, in any order."""
    of_a, of_b = ({t.name: (t.dtype, t.shape) for t in m.tensors} for m in (a, b))
    for name in sorted(of_a.keys() | of_b.keys()):
        if of_a.get(name) != of_b.get(name):
            have, want = (f"{s[0]}{list(s[1])}" if s else "missing" for s in (of_b.get(name), of_a.get(name)))
            raise WeightsRefused(f"version {b.version}: {name} is {have}, in version {a.version} it was {want}")


def _pull(manifest: Manifest, host: str, workdir, timeout: float, shared_memory: Path) -> Path:
    if not manifest.url:
        raise WeightsRefused(
            f"version {manifest.version} is not on this host ({host}): {manifest.path} of {manifest.host} was not "
            "found. It may have been replaced by a newer one; between hosts use the transport 'tcp' or 'disk'"
        )
    if workdir is None:
        raise ValueError("open_version needs the run's workdir to pull weights from another host")
    keys = load_keys(workdir)
    if keys is None and not is_loopback(manifest.url):
        raise WeightsRefused(f"weights are at {manifest.url}, beyond this host, and {workdir} holds no keys for it")
    return pull(manifest, store.run_folder(workdir, shared_memory), timeout=timeout, keys=keys)


def _wait_for(path: Path, manifest: Manifest, timeout: float) -> None:
    """A shared disk may show a file later than the message about it."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise WeightsRefused(
                f"version {manifest.version}: {path} did not appear within {timeout:g} s; is the disk shared?"
            )
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.05)


def _map(manifest: Manifest, path: Path) -> tuple[mmap.mmap, tuple[int, int, int]]:
    """Map the file under a shared lock, which lasts as long as the mapping; also returns what identifies the bytes."""
    gone = f"version {manifest.version} is gone: {path} has been replaced by a newer version"
    unreadable = f"version {manifest.version} cannot be read from {path}"  # a socket or a pipe may be there by now
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise WeightsRefused(gone) from None
    except OSError as error:
        raise WeightsRefused(f"{unreadable}: {error}") from error
    try:
        with contextlib.suppress(OSError) if manifest.transport == "disk" else contextlib.nullcontext():
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = os.fstat(fd)
        if not _still_holds(path, fd, manifest):
            raise WeightsRefused(gone)
        if found.st_size < manifest.nbytes:
            last = next(t.name for t in manifest.tensors if t.offset + store.tensor_bytes(t) > found.st_size)
            raise WeightsRefused(
                f"version {manifest.version}: {path} has {found.st_size} bytes instead of {manifest.nbytes}; "
                f"{last} is cut off"
            )
        mapped = mmap.mmap(fd, manifest.nbytes, prot=mmap.PROT_READ)  # keeps a duplicate of fd, and so the lock
        return mapped, (found.st_dev, found.st_ino, found.st_mtime_ns)
    except (BlockingIOError, FileNotFoundError):
        raise WeightsRefused(gone) from None
    except OSError as error:
        raise WeightsRefused(f"{unreadable}: {error}") from error
    finally:
        os.close(fd)


def _still_holds(path: Path, fd: int, manifest: Manifest) -> bool:
    """Whether the file, which cannot change any more, is this version's and not a later one's."""
    if store.unnamed(path):
        name = store.file_name(manifest.version, manifest.tensors).encode()
        return os.pread(fd, len(name), manifest.nbytes) == name
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
