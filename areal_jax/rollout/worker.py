"""A rollout worker: runs the controller's tasks as coroutines on an engine, and reports each sample when it is done.

The shell around engine, workflow and sockets. It decides nothing: what to generate and when to load new weights is said
by the controller; how a sample comes about is the workflow's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import numbers
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from areal_jax.data.config import DataConfig
from areal_jax.data.prompts import Prompts
from areal_jax.metrics.clock import Clock
from areal_jax.rollout.engine import Engine, EngineDied, Sampling, WeightsRefused
from areal_jax.rollout.session import Session, VerificationFailed
from areal_jax.rollout.verification import RewardClients
from areal_jax.rollout.workflows import Workflow
from areal_jax.transport.client import Client
from areal_jax.transport.errors import TransportError
from areal_jax.transport.messages import (
    AnyMessage,
    Assign,
    Cancel,
    Goodbye,
    Heartbeat,
    Hello,
    Manifest,
    Message,
    Refused,
    SampleDone,
    SampleFailed,
    Shutdown,
    Task,
    Trajectory,
    UpdateWeights,
    WeightsLoaded,
    Welcome,
)

log = logging.getLogger(__name__)

ENGINE_DIED, CONTROLLER_LOST = 3, 4  # exit codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What does not come from the engine or the workflow."""

    name: str
    seed: int  # of the run
    sampling: Sampling  # for training
    eval_sampling: Sampling
    data: DataConfig
    controller_limit: float = 120.0  # seconds without a connection to the controller, after which the worker ends


class Worker:
    """Serves one controller until told to stop. `run` returns the process's exit code.

    Args:
      engine: not started; the first weights start it.
      verifier: the reward services.
      connect: makes the connection to the controller, given what to say hello with.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        engine: Engine,
        workflow: Workflow,
        tokenizer: Any,
        verifier: RewardClients,
        connect: Callable[[Callable[[], Hello]], Client],
        clock: Clock,
    ):
        self.settings, self.engine, self.workflow = settings, engine, workflow
        self.tokenizer, self.verifier, self.clock = tokenizer, verifier, clock
        self.counts: Counter[str] = Counter()
        self._prompts = Prompts(tokenizer, settings.data)
        self._life = secrets.randbits(63)
        self._client = connect(self._hello)
        self._heartbeat_seconds = 1.0
        self._samples: dict[tuple[int, int], tuple[Task, asyncio.Task]] = {}
        self._activities: Counter[str] = Counter()  # what running samples and the loader do, or wait for
        self._welcomed = asyncio.Event()
        self._wanted: Manifest | None = None  # the newest version that is not loaded yet
        self._loader: asyncio.Task | None = None
        self._ready = asyncio.Event()  # the engine has weights
        self._end: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until told to stop, the engine dies, or the controller is gone for too long."""
        loop = asyncio.get_running_loop()
        self.engine.on_change = lambda: loop.call_soon_threadsafe(self._settle_clock)
        parts = [asyncio.create_task(part) for part in (self._listen(), self._beat())]
        try:
            await asyncio.wait([self._end, *parts], return_when=asyncio.FIRST_COMPLETED)
            for part in parts:
                if part.done() and not self._end.done():
                    part.result()
            code, reason = self._end.result()
            log.info("%s ends: %s", self.settings.name, reason)
            with suppress(TransportError):
                goodbye = Goodbye(name=self.settings.name, reason=reason, died=code == ENGINE_DIED)
                await asyncio.wait_for(self._client.send(goodbye), 1.0)
            return code
        finally:
            samples = [running for _, running in self._samples.values()]
            everything = [*parts, *samples, *([self._loader] if self._loader else [])]
            for running in everything:
                running.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
            self.verifier.close()
            self._client.close(flush=1.0)
            await self.engine.close()

    def stop(self, code: int, reason: str) -> None:
        """End soon, with this exit code; the first reason counts."""
        if not self._end.done():
            self._end.set_result((code, reason))

    # --- Controller ------------------------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            role="rollout", name=self.settings.name, host=socket.gethostname(), pid=os.getpid(), life=self._life,
            slots=self.engine.slots, version=self.engine.version,
            running=[(task.group, task.sample, task.attempt) for task, _ in self._samples.values()],
        )  # fmt: skip

    async def _send(self, message: Message) -> None:
        try:
            await self._client.send(message)
        except TransportError as error:
            self.stop(CONTROLLER_LOST, str(error))

    async def _listen(self) -> None:
        try:
            while (message := await self._client.receive()) is not None:
                self._handle(message)
        except TransportError as error:
            self.stop(CONTROLLER_LOST, str(error))

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Welcome():
                self._heartbeat_seconds = message.heartbeat_seconds
                self._welcomed.set()
            case Assign():
                for task in message.tasks:
                    self._begin(task)
            case Cancel():
                self._cancel([tuple(task) for task in message.tasks])
            case UpdateWeights():
                self._wanted = message.manifest
                if self._loader is None or self._loader.done():
                    self._loader = asyncio.create_task(self._load_wanted())
            case Shutdown():
                self.stop(0, message.reason or "told to by the controller")
            case Refused():
                log.warning("the controller refused a message: %s", message.reason)
            case _:
                log.warning("unexpected %s from the controller", type(message).__name__)

    async def _beat(self) -> None:
        while not self._welcomed.is_set():
            self._watch_connection()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._welcomed.wait(), 1.0)
        while True:
            self._watch_connection()
            try:
                stats = self.engine.stats()
            except EngineDied as death:
                return self.stop(ENGINE_DIED, str(death))
            momentary = ("running", "waiting")
            counters = {name: value for name, value in stats.items() if name not in momentary}
            gauges = {name: stats[name] for name in momentary if name in stats}
            await self._send(
                Heartbeat(
                    name=self.settings.name,
                    phase=self.clock.current,
                    clock=self.clock.totals(),
                    counters=counters | self.counts | self.verifier.counts,
                    gauges=gauges | {"version": float(self.engine.version), "samples": float(len(self._samples))},
                )
            )
            await asyncio.sleep(self._heartbeat_seconds)

    def _watch_connection(self) -> None:
        limit = self.settings.controller_limit
        if self._client.disconnected_for > limit:
            self.stop(CONTROLLER_LOST, f"no connection to the controller for {limit:g} s; {self._client.last_word}")

    # --- Weights ---------------------------------------------------------------------------------------------------

    async def _load_wanted(self) -> None:
        """Loads the newest version that was asked for; those that were overtaken meanwhile are left out."""
        while self._wanted is not None:
            manifest, self._wanted = self._wanted, None
            try:
                with self._busy("loading"):
                    timings, error = await self._load(manifest), ""
            except WeightsRefused as refused:
                timings, error = {}, str(refused)
                self.counts["weights_refused"] += 1
            except EngineDied as death:
                self.stop(ENGINE_DIED, str(death))
                return
            except Exception as failure:  # the engine could not start: its message is all that a person will see
                log.exception("loading version %d failed", manifest.version)
                self.stop(ENGINE_DIED, f"loading version {manifest.version}: {type(failure).__name__}: {failure}")
                return
            loaded = WeightsLoaded(
                name=self.settings.name, version=manifest.version, published_at=manifest.published_at,
                timings=timings, error=error,
            )  # fmt: skip
            await self._send(loaded)

    async def _load(self, manifest: Manifest) -> dict[str, float]:
        if self._ready.is_set():
            if manifest.version < self.engine.version and self._samples:
                await self._roll_back(manifest.version)
            timings = await self.engine.update_weights(manifest)
            return timings | {"latency": time.time() - manifest.published_at}  # since the optimizer step
        start = time.perf_counter()
        await self.engine.start(manifest)
        self._ready.set()
        return {"start": time.perf_counter() - start}

    async def _roll_back(self, version: int) -> None:
        """The trainer has gone back to a checkpoint: what was sampled by weights that are no more is given up."""
        lost = list(self._samples.values())
        self._cancel(list(self._samples))
        await asyncio.gather(*(running for _, running in lost), return_exceptions=True)
        detail = f"the weights went back from version {self.engine.version} to {version}"
        for task, _ in lost:
            await self._send(SampleFailed(**self._names(task), error="weights_rolled_back", detail=detail))

    # --- Samples ---------------------------------------------------------------------------------------------------

    def _begin(self, task: Task) -> None:
        name = (task.group, task.sample)
        self._cancel([name])  # an earlier attempt that is not awaited any more
        running = asyncio.create_task(self._run(task))
        running.add_done_callback(lambda done: self._ended(name, done))
        self._samples[name] = task, running
        self._settle_clock()

    def _ended(self, name: tuple[int, int], done: asyncio.Task) -> None:
        if name in self._samples and self._samples[name][1] is done:
            del self._samples[name]
        self._settle_clock()

    def _cancel(self, names: list[tuple[int, int]]) -> None:
        for name in names:
            if name in self._samples:
                self._samples.pop(name)[1].cancel()
                self.counts["samples_cancelled"] += 1

    def _names(self, task: Task) -> dict[str, Any]:
        return {"name": self.settings.name, "group": task.group, "sample": task.sample, "attempt": task.attempt}

    async def _run(self, task: Task) -> None:
        own = self._names(task)
        try:
            await self._ready.wait()
            session = Session(
                engine=self.engine,
                tokenizer=self.tokenizer,
                verifier=self.verifier,
                sampling=self.settings.eval_sampling if task.evaluation else self.settings.sampling,
                task=task,
                seed=self.settings.seed,
                data=self.settings.data,
                busy=self._busy,
                prompts=self._prompts,
            )
            trajectories = await self.workflow.run(session, task.record)
            _check(trajectories, self.engine.max_length)
            result = SampleDone(**own, trajectories=trajectories)
        except EngineDied as death:  # not the sample's failure: the goodbye hands it, and all others, to other workers
            return self.stop(ENGINE_DIED, str(death))
        except VerificationFailed as failed:
            result = SampleFailed(**own, error=failed.name, detail=failed.detail)
        except FloatingPointError as error:
            result = SampleFailed(**own, error="not_finite", detail=str(error))
        except Exception as error:  # whatever a user's workflow raises
            log.exception("the workflow failed on group %d, sample %d", task.group, task.sample)
            result = SampleFailed(**own, error="workflow_error", detail=f"{type(error).__name__}: {error}"[:2000])
        try:
            await self._send(result)
        except (TypeError, ValueError, OverflowError) as error:  # a user's numbers that no message can carry
            detail = f"what the workflow returned cannot be sent: {error}"
            result = SampleFailed(**own, error="workflow_error", detail=detail)
            await self._send(result)
        self.counts["samples_failed" if isinstance(result, SampleFailed) else "samples_done"] += 1

    # --- Clock -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _busy(self, activity: str) -> Iterator[None]:
        self._activities[activity] += 1
        self._settle_clock()
        try:
            yield
        finally:
            self._activities[activity] -= 1
            self._settle_clock()

    def _settle_clock(self) -> None:
        """Says what this process does now, the most productive thing first."""
        phase = self._phase()
        if phase != self.clock.current:
            self.clock.enter(phase)

    def _phase(self) -> str:
        if not self._ready.is_set():
            return "starting"
        if self.engine.paused:
            return "loading_weights"
        if self._activities["generating"]:
            return "generating"
        if self._activities["loading"]:
            return "loading_weights"
        for activity, phase in (("tool", "running_tools"), ("verifying", "waiting:rewards")):
            if self._activities[activity]:
                return phase
        return "workflow" if self._samples else "waiting:controller"


def _check(trajectories: Any, max_length: int) -> None:
    if not isinstance(trajectories, list) or not trajectories:
        raise TypeError(f"a workflow returns a list of at least one Trajectory, not {trajectories!r:.100}")
    for t in trajectories:
        if not isinstance(t, Trajectory):
            raise TypeError(f"a workflow returns Trajectory objects, not {type(t).__name__}")
        lengths = {name: len(getattr(t, name)) for name in ("tokens", "loss_mask", "logprobs", "versions")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the arrays of a trajectory have different lengths: {lengths}")
        if len(t.tokens) > max_length:  # which no row of the trainer need hold
            raise ValueError(f"a trajectory has {len(t.tokens)} tokens, more than rollout.max_length={max_length}")
        if not t.loss_mask.any():
            raise ValueError("a trajectory has no sampled token")
        for name, value in (*t.metrics.items(), ("reward", t.reward)):
            if not isinstance(value, numbers.Real) or (name == "reward" and isinstance(value, bool)):
                raise TypeError(f"a trajectory's {name!r} is {value!r:.100}, not a number")
        t.metrics.update({name: float(value) for name, value in t.metrics.items()})
