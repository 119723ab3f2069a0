"""Verifiers in a pool of processes: many at once, each under a time limit, none able to take another with it."""

import asyncio
import collections
import contextlib
import os
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from areal_jax.rewards.folders import sweep_folders
from areal_jax.rewards.outcome import FAILURE_KINDS, Failure, Outcome, Score, VerifierError
from areal_jax.rewards.process import WorkerProcess

TOGETHER = 0.005  # seconds that an outcome may wait for others, as to act on each alone costs several times as much


class VerifierPool:
    """Runs verifiers by import path in `processes` fresh interpreters, none of which imports jax or torch.

    A call ends in a `Score` or in a `Failure` (`timeout`, `crash`, `exception`, `bad_return`); it never raises for what
    a verifier did. A worker that overruns or dies is killed with its process group and replaced. Use it as an async
    context manager, or call `close`; all on one event loop.

    Args:
      processes: number of worker processes; default: one per core.
      timeout: seconds that one call may take once its module is imported, unless the call says otherwise.
      memory_bytes: address-space limit of each worker; 0 for none.
      start_timeout: seconds for an interpreter to start and, separately, for a verifier's module to import.
      recycle_after: calls after which a worker is replaced by a fresh one (symbolic algebra caches grow).
    """

    def __init__(
        self,
        processes: int | None = None,
        timeout: float = 15.0,
        *,
        memory_bytes: int = 4 << 30,
        start_timeout: float = 60.0,
        recycle_after: int = 50_000,
    ):
        self.processes = processes or os.cpu_count() or 1
        self.timeout = timeout
        self.counts: collections.Counter[str] = collections.Counter(
            dict.fromkeys(("started", "scored", *FAILURE_KINDS), 0)
        )
        self._memory_bytes = memory_bytes
        self._start_timeout = start_timeout
        self._recycle_after = recycle_after
        self._threads = ThreadPoolExecutor(self.processes, thread_name_prefix="verifier")
        self._calls: queue.SimpleQueue[tuple[asyncio.Future, str, dict[str, Any], float] | None] = queue.SimpleQueue()
        self._ended: list[tuple[asyncio.Future, Outcome | BaseException]] = []  # what the event loop is to be told
        self._working = False  # the threads take calls
        self._idle: list[WorkerProcess] = []
        self._busy: set[WorkerProcess] = set()
        self._lock = threading.Lock()
        self._closed = False

    async def __aenter__(self) -> "VerifierPool":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts all workers now, so that the first calls do not wait. Raises `VerifierError` if one does not start."""
        sweep_folders()
        loop = asyncio.get_running_loop()
        starts = [loop.run_in_executor(self._threads, self._new_worker) for _ in range(self.processes)]
        for worker in await asyncio.gather(*starts):
            self._put_back(worker)

    async def submit(self, path: str, fields: Mapping[str, Any], *, timeout: float | None = None) -> Outcome:
        """Calls the verifier at `path` with those of `fields` that it accepts, as soon as a worker is free.

        The verifier may be sync or async; it may take `time_limit` (seconds) to know how long it has. Waiting for a
        free worker does not count against that.
        """
        if self._closed:
            raise VerifierError("this VerifierPool is closed")
        limit = self.timeout if timeout is None else timeout
        if not self._working:
            self._working = True
            for _ in range(self.processes):
                self._threads.submit(self._work)
        future = asyncio.get_running_loop().create_future()
        self._calls.put((future, path, {"time_limit": limit, **fields}, limit))
        outcome = await future
        self.counts["scored" if isinstance(outcome, Score) else outcome.kind] += 1
        return outcome

    async def close(self) -> None:
        """Kills all workers; calls in flight end as the failure `crash`."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
            for _ in range(self.processes):
                self._calls.put(None)
        for worker in workers:
            worker.kill_group()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        for worker in workers:
            worker.kill()

    def _new_worker(self) -> WorkerProcess:
        with self._lock:
            self.counts["started"] += 1
        return WorkerProcess(memory_bytes=self._memory_bytes, start_timeout=self._start_timeout)

    def _put_back(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._busy.discard(worker)
            keep = not self._closed and worker.alive and worker.calls < self._recycle_after
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.kill()

    def _work(self) -> None:
        """One thread's work: calls, one after another. The event loop is told of the last, and of all before it."""
        while (call := self._calls.get()) is not None:
            future, *arguments = call
            try:
                outcome = self._call(*arguments)
            except BaseException as error:  # no fault of the verifier's: it is raised where the outcome is awaited
                outcome = error
            with self._lock:
                self._ended.append((future, outcome))
                first = len(self._ended) == 1
            loop, last = future.get_loop(), self._calls.empty()
            if first or last:
                with contextlib.suppress(RuntimeError):  # the event loop was closed
                    loop.call_soon_threadsafe(*(() if last else (loop.call_later, TOGETHER)), self._tell)

    def _tell(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        for future, outcome in ended:
            if future.done():  # cancelled
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _call(self, path: str, fields: Mapping[str, Any], timeout: float) -> Outcome:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and not worker.alive:  # ended while it had nothing to do: nobody's call failed
            worker.kill()
            worker = None
        if worker is None:  # the last one was killed, or the pool was not started
            try:
                worker = self._new_worker()
            except VerifierError as error:
                return Failure(kind="crash", text=str(error))
        with self._lock:
            self._busy.add(worker)
            closed = self._closed
        try:
            if closed:
                return Failure(kind="crash", text=f"{path}: the pool was closed")
            return worker.call(path, fields, timeout)
        finally:
            self._put_back(worker)
