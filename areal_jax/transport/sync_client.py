"""The connecting side for code without an event loop: a blocking DEALER socket for request and reply."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import zmq

from areal_jax.transport import wire
from areal_jax.transport.endpoints import load_keys, missing, read_endpoint
from areal_jax.transport.errors import RequestRefused, RequestTimeout
from areal_jax.transport.messages import AnyMessage, Message, Refused
from areal_jax.transport.options import HELLO_FIRST, identity, need_keys, set_up, set_up_client


class Patience:
    """A wait of `seconds`, of which only the time counts in which this process did run. Ask at least once a second.

    A process that was stopped (SIGSTOP, a suspended machine) has not waited for anybody: nobody is late.
    """

    STEP = 2.0  # seconds between two questions that a busy machine may need

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.left, self._clock, self._asked = seconds, clock, clock()

    def over(self) -> bool:
        """Whether the wait is over."""
        now = self._clock()
        self.left -= min(now - self._asked, self.STEP)
        self._asked = now
        return self.left <= 0


class SyncClient:
    """A blocking DEALER socket for request and reply, one request at a time. Not for use by several threads.

    A request is sent again while no reply comes (a lost connection, a restarted server): requests of this project
    may be repeated, and a late reply to an earlier request is thrown away.
    """

    def __init__(
        self,
        name: str,
        workdir: str | Path,
        *,
        server: str = "controller",
        hello: Callable[[], Message] | None = None,
        max_bytes: int = wire.MAX_BYTES,
        resend: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.server, self.max_bytes, self.resend = name, server, max_bytes, resend
        self.guard = wire.Guard(max_bytes=max_bytes, mute_after=wire.NEVER)  # there is but one server
        self.late = 0  # replies that came after their request had been given up
        self._workdir, self._hello, self._clock = Path(workdir), hello, clock
        self._identity, self._session = identity(name)
        self._sequence, self._requests, self._endpoint = 0, 0, ""
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None

    def _connect(self, patience: Patience) -> None:
        """Connect, or follow a server that has moved."""
        endpoint = read_endpoint(self._workdir, self.server)
        if endpoint is None and self._socket is None:
            left = patience.left
            while (endpoint := read_endpoint(self._workdir, self.server)) is None:
                if patience.over():
                    raise missing(self._workdir, self.server, left - patience.left)
                time.sleep(0.02)
        if endpoint is None or endpoint == self._endpoint:
            return
        keys = load_keys(self._workdir)
        need_keys(keys, endpoint, self.server)
        self._free(0)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        set_up(self._socket, endpoint, 1000, self.max_bytes)
        set_up_client(self._socket, self._identity, keys)
        self._socket.connect(endpoint)
        self._endpoint = endpoint
        if self._hello is not None:
            self._send(self._hello(), 0)

    def _send(self, message: Message, request: int) -> bool:
        self._sequence += 1
        parts = wire.frames(self._session, self._sequence, request, message, self.max_bytes)
        try:
            self._socket.send_multipart(parts, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def send(self, message: Message, timeout: float = 60.0) -> bool:
        """Send what has no reply; False when the queue is full. `timeout` bounds the wait for the server's file."""
        self._connect(Patience(timeout, self._clock))
        return self._send(message, 0)

    def poll(self) -> list[AnyMessage]:
        """What the server sent unasked since the last call; says hello again where that was asked for."""
        messages = []
        while self._socket is not None and self._socket.poll(0, zmq.POLLIN):
            opened = self.guard.open(self.server.encode(), self._socket.recv_multipart())
            if opened is None:
                continue
            if isinstance(opened[0], Refused) and opened[0].reason == HELLO_FIRST and self._hello is not None:
                self._send(self._hello(), 0)
            else:
                messages.append(opened[0])
        return messages

    def request(self, message: Message, timeout: float) -> AnyMessage:
        """Send a request and wait at most `timeout` seconds for its reply, in which this process runs.

        Raises `RequestTimeout` (or `EndpointMissing`), `RequestRefused` with the server's reason, `MessageTooLarge`.
        """
        patience = Patience(timeout, self._clock)
        self._requests += 1
        resend_at, pause, tries = self._clock(), self.resend, 0
        while not patience.over():
            old = self._socket
            self._connect(patience)
            if self._socket is not old or self._clock() >= resend_at:
                tries += self._send(message, self._requests)
                resend_at, pause = self._clock() + pause, min(pause * 2, 60.0)
            wait = min(patience.left, resend_at - self._clock(), 0.5)
            if not self._socket.poll(max(0, int(wait * 1000) + 1), zmq.POLLIN):
                continue
            opened = self.guard.open(self.server.encode(), self._socket.recv_multipart())
            if opened is None:
                continue
            reply, request = opened
            if isinstance(reply, Refused) and reply.reason == HELLO_FIRST and self._hello is not None:
                self._send(self._hello(), 0)
                resend_at = self._clock() + 0.05
            elif request != self._requests:
                self.late += 1
            elif isinstance(reply, Refused):
                raise RequestRefused(f"{self.server} refused {type(message).__name__}: {reply.reason}")
            else:
                return reply
        raise RequestTimeout(
            f"{self.server} at {self._endpoint} did not answer {type(message).__name__} of {self.name} "
            f"within {timeout:.1f} s (sent {tries} times); {self.guard.last_word(self.server.encode())}"
        )

    def close(self, flush: float = 0.0) -> None:
        """Close at once, or after at most `flush` seconds for what is not sent yet."""
        self._free(flush)
        self._endpoint = ""

    def _free(self, flush: float) -> None:
        if self._context is not None:
            self._context.destroy(linger=int(flush * 1000))
        self._context = self._socket = None

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
