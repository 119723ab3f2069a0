"""Versions of the weights between hosts: a byte server beside the publisher, and a puller on every other host.

With keys in the run's folder the connection is encrypted and only the run's clients are served; without them only
loopback addresses are.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
from pathlib import Path

import zmq

from areal_jax.transport.endpoints import Keys, admission, encrypt, is_loopback, reachable
from areal_jax.transport.errors import KeysMissing
from areal_jax.transport.messages import Manifest
from areal_jax.weights import store
from areal_jax.weights.copies import copy_of
from areal_jax.weights.store import WeightsRefused

log = logging.getLogger(__name__)

_CHUNK = 4 << 20  # bytes of one reply
_WINDOW = 8  # replies on their way to one client: what bounds the server's memory
_ASK_AGAIN = 5.0  # seconds without a reply after which the connection is made anew
_CLOSE_SECONDS = 30.0  # for the serving thread to end; only a read that does not return can hold it longer
_REQUEST = struct.Struct("<QI")  # offset, size


class ByteServer:
    """Serves ranges of files by name, in a thread of its own, to any number of clients. `close` it."""

    def __init__(self, address: str, keys: Keys | None = None):
        if keys is None and not is_loopback(address):
            raise KeysMissing(f"weights may not be served on {address} without keys in the run's folder")
        self._files: dict[bytes, tuple[int, int]] = {}  # name -> (file descriptor, size)
        self.refused = 0  # messages that are no request
        self._lock = threading.Lock()
        self._context = zmq.Context(min(8, os.cpu_count() or 1))  # its threads encrypt, each for some of the hosts
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1024)
        self._socket.setsockopt(zmq.SNDHWM, 2 * _WINDOW)
        self._keys, self._zap = keys, encrypt(self._socket, keys, "the trainer") if keys else None
        self._socket.bind(address)
        self.url = reachable(self._socket.last_endpoint.decode())
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def serve(self, name: str, path: Path) -> None:
        """Offer a finished file, under this name, until `forget`."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)  # its pages are not used again while it is offered
        self.forget(name)
        with self._lock:
            self._files[name.encode()] = (fd, os.fstat(fd).st_size)

    def forget(self, name: str) -> None:
        with self._lock:
            if (file := self._files.pop(name.encode(), None)) is not None:
                os.close(file[0])

    def close(self) -> None:
        if self._context.closed:
            return
        with self._context.socket(zmq.PAIR) as stop:
            stop.connect("inproc://stop")
            stop.send(b"")
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():  # it may hold the lock; as a daemon it ends with this process
            log.error("the thread that serves weights at %s has not ended in %g s; going on", self.url, _CLOSE_SECONDS)
            return
        for name in list(self._files):
            self.forget(name.decode())

    def _run(self) -> None:
        poller = zmq.Poller()
        sockets = [s for s in (self._socket, self._stop, self._zap) if s is not None]
        for sock in sockets:
            poller.register(sock, zmq.POLLIN)
        while self._stop not in (ready := dict(poller.poll())):
            if self._zap in ready:
                self._zap.send_multipart(admission(self._zap.recv_multipart(), self._keys)[1])
            if self._socket in ready:
                self._answer(self._socket.recv_multipart())
        for sock in sockets:
            sock.close(0)
        self._context.term()

    def _answer(self, parts: list[bytes]) -> None:
        """[client, name, range] -> [client, range, bytes]; no bytes when there is no such file or range."""
        if len(parts) != 3 or len(parts[2]) != _REQUEST.size:
            self.refused += 1
            return
        client, name, wanted = parts
        offset, size = _REQUEST.unpack(wanted)
        with self._lock:
            fd, end = self._files.get(name, (-1, 0))
            data = os.pread(fd, size, offset) if 0 < size <= _CHUNK and offset + size <= end else b""
        self._socket.send_multipart([client, wanted, data], copy=False)


def pull(manifest: Manifest, folder: Path, *, timeout: float, keys: Keys | None = None) -> Path:
    """This host's own copy of a version, pulled unless it is there; see `copies.copy_of`."""
    name = store.file_name(manifest.version, manifest.tensors)
    return copy_of(manifest, folder, lambda file: _fetch(manifest, name, file, timeout, keys), timeout=timeout)


def _fetch(manifest: Manifest, name: str, file, timeout: float, keys: Keys | None) -> None:
    """Append what is missing of the version to `file`, reconnecting as often as need be."""
    deadline = time.monotonic() + timeout
    while (begin := file.tell()) < manifest.nbytes:
        error = _fetch_some(manifest, name, file, min(_ASK_AGAIN, timeout), keys)
        if file.tell() > begin:
            deadline = time.monotonic() + timeout
        elif time.monotonic() > deadline:
            raise WeightsRefused(
                f"version {manifest.version}: {manifest.url} sent nothing for {timeout:g} s, after {begin} of "
                f"{manifest.nbytes} bytes" + (f" ({error})" if error else "")
            )


def _fetch_some(manifest: Manifest, name: str, file, patience: float, keys: Keys | None) -> str:
    """One connection's worth: until all is there, or nothing has come for `patience` seconds (why is returned)."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, _CHUNK + 1024)
        if keys is not None:
            sock.curve_publickey, sock.curve_secretkey = keys.client_public, keys.client_secret
            sock.curve_serverkey = keys.server_public
        sock.connect(manifest.url)
        asked = file.tell()
        while file.tell() < manifest.nbytes:
            while asked < min(manifest.nbytes, file.tell() + _WINDOW * _CHUNK):
                size = min(_CHUNK, manifest.nbytes - asked)
                sock.send_multipart([name.encode(), _REQUEST.pack(asked, size)])
                asked += size
            if not sock.poll(int(patience * 1000)):
                return "no reply; is the trainer alive, and have both sides the same keys?"
            got, data = sock.recv_multipart()
            offset, size = _REQUEST.unpack(got)
            if offset != file.tell():
                return f"byte {offset} came where {file.tell()} was expected"
            if len(data) != size:
                raise WeightsRefused(
                    f"version {manifest.version} is gone: {manifest.url} has it no more, there must be a newer one"
                )
            file.write(data)
    return ""
