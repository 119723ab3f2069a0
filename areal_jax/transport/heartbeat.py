"""Heartbeats of a role whose main thread is busy for long: a thread with a socket of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from areal_jax.transport.messages import Goodbye, Heartbeat, Hello
from areal_jax.transport.sync_client import SyncClient


class HeartbeatThread:
    """Says `hello()` once (and when asked again) and then `beat()` every `seconds`, until closed.

    Both are called in the thread, so they may only read what is safe to read there. An error in the thread (no
    server in `timeout` seconds, a `beat` that raises) is kept in `error`, and raised by `check`.
    """

    def __init__(
        self,
        name: str,
        workdir: str | Path,
        hello: Callable[[], Hello],
        beat: Callable[[], Heartbeat],
        seconds: float,
        *,
        server: str = "controller",
        timeout: float = 60.0,
    ):
        self.error: BaseException | None = None
        self._name, self._workdir, self._hello, self._beat = name, workdir, hello, beat
        self._seconds, self._server, self._timeout = seconds, server, timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with SyncClient(self._name, self._workdir, server=self._server, hello=self._hello) as client:
            try:
                while not self._stop.is_set():
                    client.send(self._beat(), self._timeout)
                    client.poll()
                    self._stop.wait(self._seconds)
                client.send(Goodbye(name=self._name), 1.0)
            except Exception as error:  # kept for the thread that can act on it
                self.error = error
            client.close(flush=1.0)

    def check(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Say goodbye and end; waits at most a few seconds."""
        self._stop.set()
        self._thread.join(5.0)

    def __enter__(self) -> HeartbeatThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
