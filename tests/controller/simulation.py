"""A controller core with made-up workers and a made-up trainer, stepped one event at a time by a test."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Stop
from areal_jax.transport import messages as m


def manifest(version: int) -> m.Manifest:
    return m.Manifest(version=version, nbytes=0, tensors=[], path="", host="h")


def trajectory(versions: list[int], reward: float = 0.0, prompt: int = 2) -> m.Trajectory:
    n = len(versions)
    return m.Trajectory(
        tokens=np.arange(prompt + n, dtype=np.int32),
        loss_mask=np.array([False] * prompt + [True] * n),
        logprobs=np.array([0.0] * prompt + [-1.0] * n, np.float32),
        versions=np.array([-1] * prompt + versions, np.int32),
        reward=reward,
        finish_reason="stop",
        metrics={"accuracy": float(reward > 0)},
    )


@dataclass
class Work:
    task: m.Task
    versions: list[int]  # one entry per token so far


@dataclass
class FakeWorker:
    """Does what a rollout worker does: every step of a sample adds a token, stamped with the weights it has now."""

    name: str
    pid: int
    slots: int = 4
    version: int = -1
    work: dict[tuple[int, int], Work] = field(default_factory=dict)
    pending_update: int | None = None

    def hello(self) -> m.Hello:
        running = [(w.task.group, w.task.sample, w.task.attempt) for w in self.work.values()]
        return m.Hello(
            role="rollout",
            name=self.name,
            host="h",
            pid=self.pid,
            slots=self.slots,
            version=self.version,
            running=running,
        )

    def take(self, message: m.Message) -> None:
        match message:
            case m.Assign():
                for task in message.tasks:
                    assert self.version >= 0 and (task.group, task.sample) not in self.work
                    self.work[task.group, task.sample] = Work(task, [])
            case m.Cancel():
                for slot in message.tasks:
                    self.work.pop(tuple(slot), None)
            case m.UpdateWeights():
                assert self.pending_update is None
                self.pending_update = message.manifest.version


class World:
    """The core, its workers and its trainer. `audit` collects what the promises are about."""

    def __init__(self, config: ControllerConfig, prompts: int, seed: int = 0, evals: int = 0, rolling: bool = True):
        self.config, self.rng, self.now = config, random.Random(seed), 0.0
        self.rolling, self.evals, self.prompts = rolling, evals, prompts
        self.records = [{"prompt": str(i)} for i in range(prompts)]
        self.core = self.new_core()
        self.workers: dict[str, FakeWorker] = {}
        self.pids = 0
        self.version = -1
        self.consumed: list[tuple[int, m.GroupResult]] = []  # (step, group), for good
        self.batches: dict[int, m.Batch] = {}
        self.stopped: str | None = None
        self.reward = lambda task: float(self.rng.random() < 0.5)

    def new_core(self, incarnation: int = 0) -> Core:
        evals = [{"prompt": f"e{i}"} for i in range(self.evals)]
        return Core(
            self.config, self.records, evals, seed=3, rolling=self.rolling, incarnation=incarnation, now=self.now
        )

    # --- Events ----------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        for action in self.core.take_actions():
            if isinstance(action, Stop):
                self.stopped = action.reason
            elif worker := self.workers.get(action.to):
                worker.take(action.message)

    def join(self, name: str, slots: int = 4) -> FakeWorker:
        self.pids += 1
        worker = self.workers[name] = FakeWorker(name, self.pids, slots)
        self.core.hello(worker.hello(), self.now)
        self.deliver()
        return worker

    def die(self, name: str) -> None:
        """Without a word: the core finds out by its silence."""
        del self.workers[name]
        self.advance(self.config.heartbeat_limit + 1)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers.values():
            self.core.heartbeat(m.Heartbeat(name=worker.name, phase="generating"), self.now)
        self.core.tick(self.now)
        self.deliver()

    def load(self, worker: FakeWorker, error: str = "") -> None:
        """`worker` has loaded the weights it was told to load."""
        version, worker.pending_update = worker.pending_update, None
        if not error:
            worker.version = version
        self.core.weights_loaded(m.WeightsLoaded(name=worker.name, version=version, error=error), self.now)
        self.deliver()

    def grow(self, worker: FakeWorker, slot: tuple[int, int]) -> None:
        worker.work[slot].versions.append(worker.version)

    def done(self, worker: FakeWorker, slot: tuple[int, int], reward: float | None = None) -> m.SampleDone:
        work = worker.work.pop(slot)
        if not work.versions:
            work.versions.append(worker.version)
        reward = self.reward(work.task) if reward is None else reward
        task = work.task
        message = m.SampleDone(worker.name, task.group, task.sample, task.attempt, [trajectory(work.versions, reward)])
        self.core.sample_done(message, self.now)
        self.deliver()
        return message

    def fail(self, worker: FakeWorker, slot: tuple[int, int], error: str = "verifier_timeout") -> None:
        task = worker.work.pop(slot).task
        self.core.sample_failed(m.SampleFailed(worker.name, task.group, task.sample, task.attempt, error), self.now)
        self.deliver()

    def publish(self, version: int) -> m.Message:
        reply = self.core.publish(manifest(version), self.now)
        if isinstance(reply, m.Published):
            self.version = version
            if (batch := self.batches.pop(version - 1, None)) is not None:
                self.consumed += [(version - 1, group) for group in batch.groups]
        self.deliver()
        return reply

    def get_batch(self, version: int) -> m.Message:
        reply = self.core.get_batch(version, self.now)
        if isinstance(reply, m.Batch):
            assert self.batches.setdefault(version, reply) == reply
        self.deliver()
        return reply

    # --- Whole stretches -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Every worker loads what it should and finishes everything it has, until nothing is left to do."""
        while True:
            for worker in self.workers.values():
                if worker.pending_update is not None:
                    self.load(worker)
                    break
                if worker.work:
                    self.done(worker, min(worker.work, key=lambda slot: (slot[0] >= 0, abs(slot[0]), slot[1])))
                    break
            else:
                return

    def audit(self) -> None:
        """The promises about what was consumed."""
        eta, batch_size = self.config.max_staleness, self.config.batch_size
        for step, group in self.consumed:
            assert step - group.oldest_version <= eta, f"group {group.group} is over age in step {step}"
            assert len(group.samples) == self.config.group_size
        numbers = Counter(group.group for _, group in self.consumed)
        visits = Counter((group.epoch, group.record_index) for _, group in self.consumed)
        assert max(numbers.values(), default=1) == 1, "a group was consumed twice"
        assert max(visits.values(), default=1) == 1, "a prompt was consumed twice in an epoch"
        sizes = Counter(step for step, _ in self.consumed)
        assert all(size == batch_size for step, size in sizes.items() if step != max(sizes)), "a short batch"
