"""The connecting side for asyncio: a DEALER socket that finds its server and follows it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import zmq
import zmq.asyncio
import zmq.utils.monitor

from areal_jax.transport import wire
from areal_jax.transport.endpoints import load_keys, missing, read_endpoint
from areal_jax.transport.errors import RequestTimeout, TransportError
from areal_jax.transport.messages import AnyMessage, Message, Refused
from areal_jax.transport.options import HELLO_FIRST, TURN, identity, need_keys, receive, set_up, set_up_client


class Client:
    """A DEALER socket connected to server `server` of the run, wherever that announces itself.

    `hello`, when given, makes the message that is sent first, and again after every loss of the connection and whenever
    the server asks for it (it restarted, or took us for dead). `timeout` bounds the wait for the server's announcement
    and for room to send.
    """

    def __init__(
        self,
        name: str,
        workdir: str | Path,
        *,
        server: str = "controller",
        hello: Callable[[], Message] | None = None,
        timeout: float = 60.0,
        max_bytes: int = wire.MAX_BYTES,
        high_water: int = 1000,
    ):
        self.name, self.server, self.timeout, self.max_bytes = name, server, timeout, max_bytes
        self.guard = wire.Guard(max_bytes=max_bytes, mute_after=wire.NEVER)  # there is but one server
        self._workdir, self._hello, self._high_water = Path(workdir), hello, high_water
        self._identity, self._session = identity(name)
        self._sequence, self._closed, self._endpoint = 0, False, ""
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task] = []
        self._gone_since: float | None = time.monotonic()
        self._opening = asyncio.Lock()

    @property
    def disconnected_for(self) -> float:
        """Seconds since the connection was lost; 0 while there is one."""
        return 0.0 if self._gone_since is None else time.monotonic() - self._gone_since

    @property
    def last_word(self) -> str:
        """What the server said last, and how long ago."""
        return self.guard.last_word(self.server.encode())

    async def open(self) -> None:
        """Find the server and connect; raises `EndpointMissing`. Sending and receiving do it by themselves."""
        async with self._opening:
            if self._socket is not None or self._closed:
                return
            started = time.monotonic()
            while (endpoint := read_endpoint(self._workdir, self.server)) is None:
                if time.monotonic() - started >= self.timeout:
                    raise missing(self._workdir, self.server, self.timeout)
                await asyncio.sleep(0.02)
            keys = load_keys(self._workdir)
            need_keys(keys, endpoint, self.server)
            self._context = zmq.asyncio.Context()
            self._socket = self._context.socket(zmq.DEALER)
            set_up(self._socket, endpoint, self._high_water, self.max_bytes)
            set_up_client(self._socket, self._identity, keys)
            monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            self._endpoint = endpoint
            self._socket.connect(endpoint)
            self._tasks = [asyncio.create_task(self._watch(monitor)), asyncio.create_task(self._follow())]
            if self._hello is not None:
                await self._send(self._hello())

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        connected = 0
        while True:
            event = zmq.utils.monitor.parse_monitor_message(await monitor.recv_multipart())
            lost = event["event"] == zmq.EVENT_DISCONNECTED
            self._gone_since = time.monotonic() if lost else None
            connected += not lost
            if not lost and connected > 1 and self._hello is not None:  # what was under way may be lost: start afresh
                await self._send(self._hello())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            endpoint = read_endpoint(self._workdir, self.server)
            if endpoint and endpoint != self._endpoint:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.disconnect(self._endpoint)
                self._endpoint = endpoint
                self._socket.connect(endpoint)

    async def send(self, message: Message) -> None:
        """Send; waits at most `timeout` seconds for room in the queue, then raises `RequestTimeout`."""
        await self.open()
        await self._send(message)

    async def _send(self, message: Message) -> None:
        if self._closed:
            raise TransportError(f"{self.name} is closed")
        self._sequence += 1
        parts = wire.frames(self._session, self._sequence, 0, message, self.max_bytes)
        sent = self._socket.send_multipart(parts)
        if sent.done() and not sent.cancelled() and sent.exception() is None:
            return  # as nearly always: no timer, no turn of the event loop
        try:
            await asyncio.wait_for(sent, self.timeout)
        except TimeoutError:
            raise RequestTimeout(
                f"{self.name}: {self.server} at {self._endpoint} has read nothing for {self.timeout:.0f} s "
                f"({'disconnected' if self._gone_since else 'connected'}, {self._high_water} messages wait); "
                f"{self.last_word}"
            ) from None

    async def receive(self) -> AnyMessage | None:
        """The next good message; None once closed."""
        await self.open()
        turn = 0
        while True:
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)
            if self._closed or (parts := await receive(self._socket, lambda: self._closed)) is None:
                return None
            opened = self.guard.open(self.server.encode(), parts)
            if opened is None:
                continue
            message = opened[0]
            if isinstance(message, Refused) and message.reason == HELLO_FIRST and self._hello is not None:
                await self._send(self._hello())
                continue
            return message

    async def __aiter__(self) -> AsyncIterator[AnyMessage]:
        turn = 0
        while (message := await self.receive()) is not None:
            yield message
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)

    def close(self, flush: float = 0.0) -> None:
        """Close at once, or after at most `flush` seconds for what is not sent yet. `async for` loops end."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._socket is not None:
            self._socket.disable_monitor()
            self._context.destroy(linger=int(flush * 1000))

    async def __aenter__(self) -> Client:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
