"""Writes versions of the weights for others to map. The trainer's side; knows numpy arrays, not jax.

`publish` streams: it takes one tensor at a time from an iterator, so that a sharded model need never be on the host as
a whole, and copies and checksums in threads while the next tensor is being prepared.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from areal_jax.transport.endpoints import load_keys
from areal_jax.transport.messages import Manifest, TensorSpec
from areal_jax.weights import store
from areal_jax.weights.file import Finished, NewFile
from areal_jax.weights.tcp import ByteServer

_CHUNK = 4 << 20  # bytes copied and checksummed at a time, while they are in cache


class Publisher:
    """Publishes one run's weights; a context manager. A run has one.

    Args:
      workdir: the run's folder.
      transport: "shm": shared memory, or `workdir/weights` where there is no room for it. "tcp": the same, and a byte
        server for other hosts. "disk": `workdir/weights`, synced, for a disk that all hosts share.
      keep: how many of the newest versions stay available. Memory needed: `keep` + 1 times the size of a version.
      address: tcp only: where to listen, `tcp://host:*`. Beyond loopback, keys in `workdir/keys` are needed.
      shared_memory: the memory file system.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        transport: str = "shm",
        keep: int = 2,
        address: str = "tcp://127.0.0.1:*",
        shared_memory: Path = store.SHARED_MEMORY,
    ):
        if transport not in ("shm", "tcp", "disk"):
            raise ValueError(f"transport is {transport!r}; use 'shm', 'tcp' or 'disk'")
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the newest version must stay")
        self.transport, self.keep = transport, keep
        self.timings: dict[str, float] = {}
        store.cleanup(workdir, shared_memory)  # left by an earlier trainer of this run; whoever maps it keeps it
        store.sweep(shared_memory)
        self._disk = store.disk_folder(workdir)
        self._memory = shared_memory if transport != "disk" and store.has_descriptors(shared_memory) else None
        if self._memory is None:
            store.make_private(self._disk)
        self._versions: dict[int, Finished] = {}  # in the order of publication
        self._spare = -1  # descriptor of a version's pages that are free to use again once nobody maps them
        self._lock = threading.Lock()
        self._workers = min(8, os.cpu_count() or 1)
        self._threads = concurrent.futures.ThreadPoolExecutor(self._workers, "publish")
        self._server = ByteServer(address, load_keys(workdir)) if transport == "tcp" else None

    def publish(
        self,
        version: int,
        named_tensors: Iterable[tuple[str, np.ndarray]],
        *,
        published_at: float | None = None,
        measured: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Write one version and return its manifest; nobody sees the file before it is whole.

        Arrays may have any layout and must not change until this returns. `published_at`: seconds since the epoch when
        the optimizer step was done (now, if not given). Afterwards `timings` has seconds for convert (waiting for
        `named_tensors`) and copy (the rest: bytes and checksums), and the megabytes written; what `named_tensors` has
        put into `measured` meanwhile (seconds by name) is reported too, and taken off convert.
        """
        start = time.perf_counter()
        published_at = time.time() if published_at is None else published_at
        with self._lock, self._new_file() as file:
            writes, converting = self._write_all(version, named_tensors, file)
            tensors = [TensorSpec(*spec, checksum=write.result()) for spec, write in writes]
            nbytes = max((t.offset + store.tensor_bytes(t) for t in tensors), default=0)
            if not nbytes:
                raise ValueError(f"version {version} has no tensors")
            made = file.finish(store.file_name(version, tensors), nbytes, sync=self.transport == "disk")
            if self._server:
                self._server.serve(made.name, made.path)
            self._retire(version, made)
            took = time.perf_counter() - start
            parts = dict(measured or {})
            parts |= {"convert": converting - sum(parts.values()), "copy": took - converting}
            self.timings = parts | {"megabytes": nbytes / 1e6}
            return Manifest(
                version=version,
                nbytes=nbytes,
                tensors=tensors,
                path=str(made.path),
                host=socket.gethostname(),
                transport=self.transport,
                url=self._server.url if self._server else "",
                published_at=published_at,
            )

    def close(self) -> None:
        """Remove every version; processes that map one keep it until they let go."""
        self._threads.shutdown()
        if self._server:
            self._server.close()
        for version in self._versions.values():
            version.remove()
        self._versions.clear()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        shutil.rmtree(self._disk, ignore_errors=True)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_file(self) -> NewFile:
        spare, self._spare = self._spare, -1
        return NewFile(self._memory, self._disk, spare)

    def _write_all(self, version: int, named_tensors: Iterable[tuple[str, np.ndarray]], file: NewFile):
        """Write every tensor; returns [((name, dtype, shape, offset), future of the checksum)] and seconds waited."""
        writes, running, names = [], collections.deque(), set()
        offset, converting = 0, 0.0
        source = iter(named_tensors)
        try:
            while True:
                asked = time.perf_counter()
                name, array = next(source, ("", None))
                converting += time.perf_counter() - asked
                if array is None:
                    break
                if name in names:
                    raise ValueError(f"version {version}: {name} came twice")
                if array.dtype.name not in store.DTYPES:
                    raise ValueError(f"{name} is {array.dtype}, which is not carried; use {', '.join(store.DTYPES)}")
                names.add(name)
                write = self._threads.submit(_write, file, array, offset)
                writes.append(((name, array.dtype.name, tuple(map(int, array.shape)), offset), write))
                running.append(write)
                if len(running) > 2 * self._workers:  # bounds the memory held by tensors on their way
                    running.popleft().result()
                offset += -(-array.nbytes // store.ALIGNMENT) * store.ALIGNMENT
            return writes, converting
        finally:
            concurrent.futures.wait(running)  # whatever comes next, nobody writes any more

    def _retire(self, version: int, made: Finished) -> None:
        """Take what is not kept any more out of sight; its pages serve a later version once nobody maps them."""
        stale = [self._versions.pop(version, made)]
        self._versions[version] = made
        stale += [self._versions.pop(v) for v in list(self._versions)[: -self.keep]]
        for old in stale:
            if old.path == made.path:
                continue
            if self._server:
                self._server.forget(old.name)
            if (fd := old.retire()) >= 0:
                if self._spare >= 0:
                    os.close(self._spare)
                self._spare = fd


def _write(file: NewFile, array: np.ndarray, offset: int) -> int:
    """Write one tensor at `offset`; returns the crc32 of its bytes."""
    data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    checksum = 0
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        checksum = zlib.crc32(chunk, checksum)
        file.write(chunk, offset + start)
    return checksum
