"""The reward service: rollout workers ask `Verify`, a pool of processes works, `Score` or `VerifyFailed` goes back.

Questions are judged concurrently and answered as they are done. It reads no more questions than it may hold: beyond
that they wait in the sockets, and slow their senders down. The controller gets a hello, heartbeats and the counts.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import socket
from collections.abc import Callable

from areal_jax.metrics.clock import Clock
from areal_jax.rewards.compose import Recipe, Verifier, judge
from areal_jax.rewards.config import RewardsConfig
from areal_jax.rewards.outcome import Failure, Outcome
from areal_jax.rewards.outcome import Score as Judged
from areal_jax.rewards.pool import VerifierPool
from areal_jax.transport.messages import Goodbye, Heartbeat, Hello, Score, Shutdown, Verify, VerifyFailed, Welcome
from areal_jax.transport.sockets import Client, Peer, Server

log = logging.getLogger(__name__)
MOST_REASONS = 50  # different reasons that are counted by name


def recipe_of(config: RewardsConfig) -> Recipe:
    """The recipe that the settings describe; raises `ValueError` in one line where they do not fit together."""
    counts = {len(config.verifiers), len(config.weights), len(config.verifier_args)}
    if len(counts) > 1:
        raise ValueError("rewards.verifiers, rewards.weights and rewards.verifier_args must have the same length")
    return Recipe(
        verifiers=tuple(
            Verifier(path=path, weight=weight, arguments=arguments)
            for path, weight, arguments in zip(config.verifiers, config.weights, config.verifier_args)
        ),
        scale=config.scale,
        offset=config.offset,
        overlong_max=config.overlong_max,
        overlong_buffer=config.overlong_buffer,
        overlong_factor=config.overlong_factor,
    )


class RewardService:
    """One reward service; `run` returns the process's exit code.

    Args:
      pool: verifier processes; started and closed by `run`.
      server: where questions come from.
      connect: makes the connection to the controller from a function that makes this service's hello.
      max_pending: questions held at once.
      controller_limit: seconds without a connection to the controller after which the service gives up.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        name: str,
        pool: VerifierPool,
        server: Server,
        connect: Callable[[Callable[[], Hello]], Client],
        clock: Clock,
        max_pending: int = 4096,
        controller_limit: float = 120.0,
    ):
        self.name, self.recipe, self.pool, self.server, self.clock = name, recipe, pool, server, clock
        self.counts: collections.Counter[str] = collections.Counter(verified=0, failed=0, repeated=0, undelivered=0)
        self._room = asyncio.Semaphore(max_pending)
        self._pending: dict[tuple[bytes, int], asyncio.Task] = {}
        self._controller = connect(self.hello)
        self._controller_limit = controller_limit
        self._beat_every = 1.0
        self._stopping = asyncio.Event()
        self._code, self._reason = 0, ""

    def hello(self) -> Hello:
        """How this service introduces itself."""
        return Hello(role="rewards", name=self.name, host=socket.gethostname(), pid=os.getpid())

    def stop(self, code: int, reason: str) -> None:
        """Ends `run`; the first call counts."""
        if not self._stopping.is_set():
            self._code, self._reason = code, reason
            self._stopping.set()

    async def run(self) -> int:
        """Serves until `stop`, the controller's `Shutdown`, or its absence. Leaves no process behind."""
        try:
            async with self.pool:
                self.clock.enter("idle")
                tasks = [asyncio.create_task(work()) for work in (self._listen, self._report, self._hear)]
                stopping = asyncio.create_task(self._stopping.wait())
                done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
                for task in (*tasks, stopping, *self._pending.values()):
                    task.cancel()
                await asyncio.gather(*tasks, stopping, *self._pending.values(), return_exceptions=True)
                for task in done - {stopping}:
                    task.result()
                if not self._controller.disconnected_for:
                    await self._controller.send(Goodbye(name=self.name, reason=self._reason))
        finally:
            self._controller.close(flush=1.0)
            self.server.close(flush=1.0)
        log.info("%s ends: %s", self.name, self._reason)
        return self._code

    async def _listen(self) -> None:
        while True:
            await self._room.acquire()
            received = await self.server.receive()
            if received is None:
                return
            peer, message = received
            if not isinstance(message, Verify):
                log.warning("%s sent a %s; only Verify is answered here", peer.name, type(message).__name__)
                self._room.release()
                continue
            key = (peer.identity, message.request)
            if key in self._pending:  # asked again because the answer takes long: it will come
                self.counts["repeated"] += 1
                self._room.release()
                continue
            self._pending[key] = asyncio.create_task(self._answer(peer, message))
            self.clock.enter("verifying")

    async def _answer(self, peer: Peer, question: Verify) -> None:
        try:
            outcome = await judge(self.pool, self.recipe, fields_of(question))
            self._count(outcome)
            if not await self.server.send(peer, reply_to(question, outcome)):
                self.counts["undelivered"] += 1
        finally:
            del self._pending[(peer.identity, question.request)]
            self._room.release()
            if not self._pending:
                self.clock.enter("idle")

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self.counts["failed"] += 1
            self.counts[f"failed_{outcome.kind}"] += 1
            if self.counts[f"failed_{outcome.kind}"] in (1, 10, 100, 1000):
                log.warning("verification failed (%s): %s", outcome.kind, outcome.text)
            return
        self.counts["verified"] += 1
        reason = f"reason/{outcome.reason.partition(':')[0].partition(' (')[0]}"
        if outcome.reason and (reason in self.counts or len(self.counts) < MOST_REASONS):
            self.counts[reason] += 1

    async def _report(self) -> None:
        while True:
            if self._controller.disconnected_for > self._controller_limit:
                last = self._controller.last_word
                self.stop(1, f"no connection to the controller for {self._controller_limit:g} s; {last}")
            counters = {name: float(count) for name, count in (self.counts + self._restarts()).items()}
            counters |= {f"refused_{kind}": float(count) for kind, count in self.server.guard.refused.items()}
            gauges = {"pending": float(len(self._pending))}
            beat = Heartbeat(
                name=self.name, phase=self.clock.current, clock=self.clock.totals(), counters=counters, gauges=gauges
            )
            if not self._controller.disconnected_for:
                await self._controller.send(beat)
            await asyncio.sleep(self._beat_every)

    def _restarts(self) -> collections.Counter[str]:
        started = self.pool.counts["started"] - self.pool.processes
        return collections.Counter(verifier_processes_replaced=max(0, started))

    async def _hear(self) -> None:
        async for message in self._controller:
            if isinstance(message, Welcome):
                self._beat_every = message.heartbeat_seconds
            elif isinstance(message, Shutdown):
                self.stop(0, f"the controller asked for it: {message.reason}")


def fields_of(question: Verify) -> dict:
    """Everything that a verifier may take by name: the record's fields, and what was generated."""
    return question.record | {
        "prompt": question.prompt,
        "completion": question.completion,
        "prompt_tokens": question.prompt_tokens,
        "completion_tokens": question.completion_tokens,
    }


def reply_to(question: Verify, outcome: Outcome) -> Score | VerifyFailed:
    """The message that carries `outcome` back."""
    if isinstance(outcome, Judged):
        metrics = {"accuracy": outcome.accuracy} | outcome.values
        return Score(request=question.request, reward=outcome.reward, metrics=metrics)
    return VerifyFailed(request=question.request, error=outcome.kind, detail=outcome.text)
