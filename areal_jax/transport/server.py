"""The listening side: a ROUTER socket with a guard in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from areal_jax.transport import wire
from areal_jax.transport.endpoints import (
    Keys,
    admission,
    encrypt,
    is_loopback,
    load_keys,
    reachable,
    read_endpoint,
    split_address,
    write_endpoint,
)
from areal_jax.transport.errors import KeysMissing, TransportError
from areal_jax.transport.messages import AnyMessage, Message, Refused
from areal_jax.transport.options import TURN, receive, set_up


@dataclass(frozen=True)
class Peer:
    """Who sent a message; equal for all messages of one connection. To reply, use the object that came with it."""

    identity: bytes
    request: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """The name that the client gave itself (not proven: any client of the run may use it)."""
        return self.identity.rpartition(b"/")[0].decode(errors="replace")

    def __str__(self) -> str:
        return self.identity.decode(errors="replace")


class Server:
    """A ROUTER socket that announces itself as `WORKDIR/endpoints/NAME`. Make it inside a running event loop.

    With keys in `WORKDIR/keys` every connection is encrypted and clients must have the run's client key; without keys
    only loopback addresses are allowed. Raises `KeysMissing`, or `TransportError` when the port is taken.
    """

    def __init__(
        self,
        address: str,
        name: str,
        workdir: str | Path,
        *,
        max_bytes: int = wire.MAX_BYTES,
        high_water: int = 1000,
        mute_after: int = 100,
    ):
        self.name, self.max_bytes = name, max_bytes
        self.guard = wire.Guard(max_bytes=max_bytes, mute_after=mute_after)
        self.unauthenticated = 0  # connections refused for lack of the run's key
        self.undelivered = 0  # messages to peers that were gone or did not read
        self._session, self._sequence, self._closed = secrets.randbits(63), 0, False
        keys = load_keys(workdir)
        if keys is None and not is_loopback(address):
            raise KeysMissing(
                f"{name} may not listen on {address} without encryption: make keys with "
                f"areal_jax.transport.endpoints.make_keys({str(workdir)!r}), or use tcp://127.0.0.1:*"
            )
        self._context = zmq.asyncio.Context()
        self._zap: asyncio.Task | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            set_up(self._socket, address, high_water, max_bytes)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            if keys is not None:
                self._zap = asyncio.create_task(self._admit(encrypt(self._socket, keys, name), keys))
            self.endpoint = reachable(self._bind(address, read_endpoint(workdir, name)))
            write_endpoint(workdir, name, self.endpoint)
        except BaseException:
            self._free(0)
            raise

    async def _admit(self, questions: zmq.asyncio.Socket, keys: Keys) -> None:
        while (question := await receive(questions, lambda: self._closed)) is not None:
            known, answer = admission(question, keys)
            self.unauthenticated += not known
            await questions.send_multipart(answer)

    def _bind(self, address: str, old: str | None) -> str:
        host, port = split_address(address)
        with contextlib.suppress(zmq.ZMQError, TransportError):
            if port == "*" and old:  # the port of our former life, which clients still try
                self._socket.bind(f"tcp://{host}:{split_address(old)[1]}")
                return self._socket.last_endpoint.decode()
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise TransportError(
                f"{self.name} cannot listen on {address}: {error.strerror}; choose another port, or '*' for any"
            ) from None
        return self._socket.last_endpoint.decode()

    async def send(self, peer: Peer, message: Message) -> bool:
        """Send without waiting. False when the peer is gone, or has not read its last `high_water` messages."""
        self._sequence += 1
        parts = wire.frames(self._session, self._sequence, peer.request, message, self.max_bytes)
        try:
            await self._socket.send_multipart([peer.identity, *parts], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if self._closed or error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.undelivered += 1
            return False
        return True

    async def receive(self, wait: bool = True) -> tuple[Peer, AnyMessage] | None:
        """The next good message; None once the server is closed. Refused ones are counted and answered `Refused`.

        With `wait=False` only what has arrived already, and None when there is nothing.
        """
        turn = 0
        while True:
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)
            try:
                parts = await receive(self._socket, lambda: self._closed, flags=0 if wait else zmq.NOBLOCK)
            except zmq.Again:
                return None
            if parts is None:
                return None
            identity, *parts = parts
            opened = self.guard.open(identity, parts)
            if opened is not None:
                return Peer(identity, opened[1]), opened[0]
            record = self.guard.peers[identity]
            if record.in_a_row < self.guard.mute_after:
                await self.send(Peer(identity), Refused(reason=record.why))

    async def __aiter__(self) -> AsyncIterator[tuple[Peer, AnyMessage]]:
        turn = 0
        while (received := await self.receive()) is not None:
            yield received
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)

    def close(self, flush: float = 0.0) -> None:
        """Close at once, or after at most `flush` seconds for what is not sent yet. `async for` loops end."""
        if not self._closed:
            self._closed = True
            self._free(flush)

    def _free(self, flush: float) -> None:
        if self._zap is not None:
            self._zap.cancel()
        self._context.destroy(linger=int(flush * 1000))

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
