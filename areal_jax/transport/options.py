"""What server and clients have in common: socket options, identities, and one way to receive."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import zmq
import zmq.asyncio

from areal_jax.transport.endpoints import Keys, is_loopback
from areal_jax.transport.errors import KeysMissing

HELLO_FIRST = "hello first"  # a `Refused` with this reason makes a client say its hello (again)
TURN = 32  # messages handed out before the event loop gets a turn


def set_up(sock: zmq.Socket, address: str, high_water: int, max_bytes: int) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.IPV6, int("[" in address))
    sock.setsockopt(zmq.SNDHWM, high_water)
    sock.setsockopt(zmq.RCVHWM, high_water)
    sock.setsockopt(zmq.MAXMSGSIZE, max_bytes + 4096)  # beyond it the connection is dropped unread
    sock.setsockopt(zmq.HEARTBEAT_IVL, 2_000)  # notices a peer that vanished without closing
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20_000)


def set_up_client(sock: zmq.Socket, identity: bytes, keys: Keys | None) -> None:
    sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.RECONNECT_IVL, 50)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
    if keys is not None:
        sock.curve_publickey = keys.client_public
        sock.curve_secretkey = keys.client_secret
        sock.curve_serverkey = keys.server_public


def identity(name: str) -> tuple[bytes, int]:
    """A routing id that no other process has, and the session number of its headers."""
    if not 0 < len(name.encode()) <= 200 or "/" in name:
        raise ValueError(f"{name!r} cannot name a client: 1 to 200 bytes without '/'")
    session = secrets.randbits(63)
    return f"{name}/{session:016x}".encode(), session


def need_keys(keys: Keys | None, endpoint: str, server: str) -> None:
    if keys is None and not is_loopback(endpoint):
        raise KeysMissing(f"{server} is at {endpoint}, beyond this host, and the run's folder holds no keys for it")


async def receive(sock: zmq.asyncio.Socket, closed: Callable[[], bool], flags: int = 0) -> list[bytes] | None:
    if closed():
        return None
    try:
        return await sock.recv_multipart(flags)
    except zmq.ZMQError:
        if closed():
            return None
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if closed() and not (task and task.cancelling()):  # the socket was closed under us: an end, not a cancellation
            return None
        raise
