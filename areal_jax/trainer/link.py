"""The trainer's line to the controller: requests with bounded waits, heartbeats, and weights published meanwhile."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from areal_jax.disk import NO_ROOM, RETRY_SECONDS
from areal_jax.metrics.clock import Clock
from areal_jax.transport import messages as m
from areal_jax.transport.endpoints import split_address
from areal_jax.transport.errors import EndpointMissing, RequestTimeout, TransportError
from areal_jax.transport.silence import Silence, report_silence
from areal_jax.transport.sockets import HeartbeatThread, SyncClient
from areal_jax.weights import Publisher

# The tensors of a version, anew with each call; puts what it has measured (seconds by name) into its argument.
Tensors = Callable[[dict[str, float]], Iterable[tuple[str, np.ndarray]]]


class WaitedTooLong(RuntimeError):
    """Nothing came within the limit; the message says what was awaited, for how long, and what the controller said."""


class Stopped(Exception):
    """The process was told to end while it waited."""


def ask(client: SyncClient, workdir: str | os.PathLike, message: m.Message, limit: float) -> m.AnyMessage:
    """As `client.request`; but a controller that does not answer is reported, and the one in its place asked again. One
    that was never there is its launcher's business (`launch.announce_limit`)."""
    try:
        return client.request(message, limit)
    except EndpointMissing:
        return client.request(message, limit)
    except RequestTimeout:
        awaited = f"asked for {type(message).__name__}"
        with contextlib.suppress(OSError):  # a full disk
            report_silence(workdir, client.server, Silence("", 0, limit, awaited, by=client.name))
        return client.request(message, limit)


def settle(
    client: SyncClient, workdir: str | os.PathLike, message: m.Message, limit: float, patience: float
) -> m.AnyMessage:
    """As `ask`, for what the controller must write down first: asked again for `patience` seconds while it cannot.

    Raises:
      WaitedTooLong: it still could not; the message says why.
    """
    started = time.monotonic()
    while isinstance(reply := ask(client, workdir, message, limit), m.NotReady):
        if time.monotonic() - started > patience:
            what = type(message).__name__
            raise WaitedTooLong(f"waited {patience:.0f} s with {what}; the controller waits for {reply.waiting_for}")
        time.sleep(RETRY_SECONDS)
    return reply


class Link:
    """One trainer process's connections; a context manager.

    Args:
      workdir: the run's folder, where the controller's endpoint is found.
      process: this JAX process; 0 publishes and decides.
      clock: where this process's time goes; sent with every heartbeat.
      heartbeat_seconds: how often.
      limit: seconds to wait for one reply; the controller answers within about a second, with NotReady if need be.
      patience: seconds in which the controller may be without room on its disk.
      told_to_stop: asked while waiting; waiting ends with `Stopped` once it says so.
      agree: (this process has what it waits for, it is told to stop) -> (all have, one is); for several processes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        process: int,
        clock: Clock,
        *,
        heartbeat_seconds: float = 1.0,
        limit: float = 120.0,
        patience: float = 1200.0,
        told_to_stop: Callable[[], bool] = lambda: False,
        agree: Callable[[bool, bool], tuple[bool, bool]] = lambda ready, stop: (ready, stop),
    ):
        self.name, self.clock = f"trainer-{process}", clock
        self.counters: dict[str, float] = {}
        self.gauges: dict[str, float] = {}
        self.no_room: dict[str, str] = {}  # what each part of this process cannot write just now; "" where all is well
        self._told_to_stop, self._agree, self._limit, self._patience = told_to_stop, agree, limit, patience
        self._workdir = Path(workdir)
        self._client = SyncClient(self.name, workdir, hello=self._hello)
        # Twice: a controller that is nowhere is reported after `limit`, and another one must be there after as long.
        timeout = 2 * limit
        self._heart = HeartbeatThread(self.name, workdir, self._hello, self._beat, heartbeat_seconds, timeout=timeout)

    def _hello(self) -> m.Hello:
        return m.Hello(role="trainer", name=self.name, host=socket.gethostname(), pid=os.getpid())

    def _beat(self) -> m.Heartbeat:
        return m.Heartbeat(
            name=self.name,
            phase=NO_ROOM if any(list(self.no_room.values())) else self.clock.current,
            clock=self.clock.totals(),
            counters=dict(self.counters),
            gauges=dict(self.gauges),
        )

    def request(self, message: m.Message) -> m.AnyMessage:
        """One request, one reply; errors as of `SyncClient.request`, after the second time that nothing came."""
        self._heart.check()
        return ask(self._client, self._workdir, message, self._limit)

    def settle(self, message: m.Message) -> m.AnyMessage:
        """As `request`, for what the controller must write down before it answers."""
        self._heart.check()
        return settle(self._client, self._workdir, message, self._limit, self._patience)

    def wait(self, message: m.Message, limit: float, what: str) -> m.AnyMessage:
        """Repeats a request until the answer is not NotReady, in phase "waiting:<what>".

        With several trainer processes all wait for the same thing, and go on, or stop, together. The time in which the
        controller's disk is full does not count: that has a limit of its own.

        Raises:
          WaitedTooLong: after `limit` seconds, with the controller's last word.
          Stopped: when a process was told to end.
        """
        return self.until(lambda: self.request(message), limit, what)

    def until(self, ask: Callable[[], m.AnyMessage | None], limit: float, what: str) -> m.AnyMessage | None:
        """As `wait`, for anything that can be asked in a moment; asks until the answer is not NotReady."""
        started, reply = time.monotonic(), m.NotReady(waiting_for="nothing yet")
        with self.clock.phase(f"waiting:{what}"):
            while True:
                if isinstance(reply, m.NotReady):
                    reply = ask()
                ready, stop = self._agree(not isinstance(reply, m.NotReady), self._told_to_stop())
                if stop:
                    raise Stopped(f"while waiting for {what}")
                if ready:
                    return reply
                if getattr(reply, "disk", False):
                    started = time.monotonic()
                if time.monotonic() - started > limit:
                    said = getattr(reply, "waiting_for", "the other trainer processes")
                    raise WaitedTooLong(f"waited {limit:.0f} s for {what}; the controller is waiting for {said}")

    def batch(self, version: int, limit: float) -> m.Batch:
        """The batch of training step `version`; without groups when there is no data left."""
        return self.wait(m.GetBatch(version=version), limit, "batch")

    def close(self) -> None:
        """Say goodbye and end."""
        self._heart.close()
        self._client.close()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BackgroundPublisher:
    """Publishes versions in a thread of its own, so that the next batch can be fetched and computed meanwhile.

    `join` must be called before the arrays behind the tensors change; it raises what went wrong. `insist` is given what
    writes a version and calls it, until it succeeds, as `disk.insist` does, for less than `patience` seconds.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, transport: str, address: str = "tcp://127.0.0.1:*", limit: float = 120.0,
        patience: float = 1200.0, insist: Callable[[Callable[[], m.Manifest]], m.Manifest] = lambda write: write(),
    ):  # fmt: skip
        self._limit, self._patience, self._insist = limit, patience, insist
        # Longer than all that the thread itself waits for: a disk, and a controller that is replaced meanwhile.
        self._join_limit = 2 * patience + 4 * limit
        self._doing = ""
        host, _ = split_address(address)  # a port of its own, on the same network: the controller may have a fixed one
        self.publisher = Publisher(workdir, transport=transport, address=f"tcp://{host}:*")
        self.manifest: m.Manifest | None = None
        self.timings: dict[str, float] = {}
        self._workdir = workdir
        self._client: SyncClient | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, version: int, tensors: Tensors) -> None:
        """Begin to publish; returns at once. `tensors` is called for each try."""
        self.join()
        arguments = (version, tensors, time.time())
        self._thread = threading.Thread(target=self._run, args=arguments, name="publish", daemon=True)
        self._thread.start()

    def publish(self, version: int, tensors: Tensors) -> None:
        """Publish and wait until the controller knows."""
        self.join()
        self._run(version, tensors, time.time())
        self.join()

    def _run(self, version: int, tensors: Tensors, at: float) -> None:
        started = time.perf_counter()

        def write() -> m.Manifest:
            measured: dict[str, float] = {}
            return self.publisher.publish(version, tensors(measured), published_at=at, measured=measured)

        try:
            self._doing = f"version {version} is being written"
            self.manifest = self._insist(write)
            self._doing = f"the controller is being told of version {version}"
            if self._client is None:
                self._client = SyncClient("trainer-publisher", self._workdir)
            settle(self._client, self._workdir, m.Publish(manifest=self.manifest), self._limit, self._patience)
            self.timings = {f"weights/{name}": value for name, value in self.publisher.timings.items()}
            self.timings["time/publish"] = time.perf_counter() - started
        except BaseException as error:  # raised where the trainer waits for this thread
            self._error = error

    def join(self) -> None:
        """Wait until the version is published.

        Raises:
          WaitedTooLong: it still is not after more than everything it waits for may take.
        """
        if self._thread is not None:
            self._thread.join(self._join_limit)
            if self._thread.is_alive():
                raise WaitedTooLong(f"waited {self._join_limit:.0f} s for the publishing thread: {self._doing}")
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End, and free the memory of the versions."""
        if self._thread is not None:
            self._thread.join(self._limit)
        if self._client is not None:
            self._client.close()
        self.publisher.close()


class BackgroundEvaluation:
    """Asks for the evaluation of a published version in a thread of its own, and keeps the result for later."""

    def __init__(self, workdir: str | os.PathLike, version: int, limit: float, reply_limit: float = 120.0):
        self._reply_limit = reply_limit
        self.version, self.result, self.problem = version, None, ""
        self.waiting_for, self.disk = "the controller", False
        self._workdir, self._limit = workdir, limit
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        deadline = time.monotonic() + self._limit
        try:
            with SyncClient("trainer-evaluation", self._workdir) as client:
                while self.result is None and not self._end.is_set():
                    reply = client.request(m.Evaluate(version=self.version), self._reply_limit)
                    if isinstance(reply, m.EvaluationResult):
                        self.result = reply
                        return
                    self.waiting_for, self.disk = getattr(reply, "waiting_for", ""), getattr(reply, "disk", False)
                    if self.disk:
                        deadline = time.monotonic() + self._limit
                    if time.monotonic() > deadline:
                        raise WaitedTooLong(
                            f"waited {self._limit:.0f} s; the controller is waiting for {self.waiting_for}"
                        )
        except (TransportError, WaitedTooLong) as error:
            self.problem = str(error)

    @property
    def running(self) -> bool:
        """Whether there is neither a result nor a problem yet."""
        return self._thread.is_alive()

    def poll(self, seconds: float = 0.2) -> m.NotReady | None:
        """NotReady while it runs; waits for at most so many seconds."""
        self._thread.join(seconds)
        return m.NotReady(waiting_for=self.waiting_for, disk=self.disk) if self.running else None

    def close(self) -> None:
        """Give up waiting."""
        self._end.set()
        self._thread.join(self._reply_limit)
