"""A controller core with made-up workers and a made-up trainer, stepped one event at a time by a test."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Silent, Stop
from areal_jax.controller.journal import Journal
from areal_jax.transport import messages as m


def manifest(version: int, path: str = "", published_at: float = 0.0) -> m.Manifest:
    return m.Manifest(version=version, nbytes=0, tensors=[], path=path, host="h", published_at=published_at)


def trajectory(versions: list[int], reward: float = 0.0, prompt: int = 2, serial: int = 0) -> m.Trajectory:
    n = len(versions)
    return m.Trajectory(
        tokens=np.arange(prompt + n, dtype=np.int32),
        loss_mask=np.array([False] * prompt + [True] * n),
        logprobs=np.array([0.0] * prompt + [-1.0] * n, np.float32),
        versions=np.array([-1] * prompt + versions, np.int32),
        reward=reward,
        finish_reason="stop",
        metrics={"accuracy": float(reward > 0), "serial": float(serial)},
    )


@dataclass
class Work:
    task: m.Task
    tokens: list[tuple[int, str]] = field(default_factory=list)  # (version, which weights that was), per token


@dataclass
class FakeWorker:
    """Does what a rollout worker does: every step of a sample adds a token, stamped with the weights it has now."""

    name: str
    life: int
    slots: int = 4
    version: int = -1
    path: str = ""
    work: dict[tuple[int, int], Work] = field(default_factory=dict)
    updates: list[m.Manifest] = field(default_factory=list)  # told to load, not loaded yet

    def hello(self) -> m.Hello:
        return m.Hello(
            role="rollout",
            name=self.name,
            host="h",
            pid=1,  # as in containers, where every process may have this number
            life=self.life,
            slots=self.slots,
            version=self.version,
            running=[(w.task.group, w.task.sample, w.task.attempt) for w in self.work.values()],
        )

    def take(self, message: m.Message) -> None:
        match message:
            case m.Assign():
                for task in message.tasks:
                    assert (task.group, task.sample) not in self.work, "given what it has already"
                    self.work[task.group, task.sample] = Work(task)
                assert len(self.work) <= 2 * self.slots
            case m.Cancel():
                for slot in message.tasks:
                    self.work.pop(tuple(slot), None)
            case m.UpdateWeights():
                self.updates.append(message.manifest)

    def grow(self, slot: tuple[int, int]) -> None:
        self.work[slot].tokens.append((self.version, self.path))


class World:
    """The core, its workers and its trainer, and everything that was ever consumed."""

    def __init__(self, config: ControllerConfig, prompts: int, seed=0, evals=0, rolling=True, steps=0):
        self.config, self.rng, self.now = config, random.Random(seed), 0.0
        self.rolling, self.evals, self.steps, self.incarnation, self.lives = rolling, evals, steps, -1, 0
        self.records = [{"prompt": str(i)} for i in range(prompts)]
        self.workers: dict[str, FakeWorker] = {}
        self.version, self.publications = -1, 0
        self.weights: dict[int, str] = {}  # version -> which weights that is, in the present life of the run
        self.consumed: list[tuple[int, m.GroupResult]] = []  # (step, group), for good
        self.batches: dict[int, m.Batch] = {}
        self.stopped: str | None = None
        self.results: list[m.Message] = []  # everything workers ever reported
        self.origin: list[list[tuple[int, str]]] = []  # by trajectory: version and weights of each token
        self.silent: list[Silent] = []
        self.folder = tempfile.TemporaryDirectory()
        self.journal = Journal(self.folder.name)
        self.core = self.new_core()

    def new_core(self) -> Core:
        self.incarnation += 1
        evals = [{"prompt": f"e{i}"} for i in range(self.evals)]
        return Core(
            self.config, self.records, evals, seed=3, rolling=self.rolling, incarnation=self.incarnation,
            steps=self.steps, now=self.now,
        )  # fmt: skip

    # --- Events ----------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        self.spool()
        if self.rng.random() < 0.03:
            self.journal.write(self.core)
        for action in self.core.take_actions():
            if isinstance(action, Stop):
                self.stopped = action.reason
            elif isinstance(action, Silent):
                self.silent.append(action)
            elif worker := self.workers.get(action.to):
                worker.take(action.message)

    def join(self, name: str, slots: int = 4) -> FakeWorker:
        self.lives += 1
        worker = self.workers[name] = FakeWorker(name, self.lives, slots)
        self.core.hello(worker.hello(), self.now)
        self.deliver()
        return worker

    def die(self, name: str) -> None:
        """Without a word: the core finds out by its silence."""
        del self.workers[name]
        self.advance(self.config.heartbeat_limit + 1)

    def leave(self, name: str, died: bool = False) -> None:
        """With a goodbye; `died`: because its engine did."""
        del self.workers[name]
        self.core.goodbye(name, self.now, died=died)
        self.deliver()

    def cut(self, name: str, seconds: float = 0.0) -> FakeWorker:
        """A message to it finds nobody, and it is away for so long; it may come back, or another may."""
        worker = self.workers.pop(name)
        self.core.unreachable(name, self.now)
        self.deliver()
        if seconds:
            self.advance(seconds)
        return worker

    def rejoin(self, worker: FakeWorker) -> None:
        """The same process says hello again."""
        self.workers[worker.name] = worker
        self.core.hello(worker.hello(), self.now)
        self.deliver()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers.values():
            self.core.heartbeat(m.Heartbeat(name=worker.name, phase="generating"), self.now)
        self.core.tick(self.now)
        self.deliver()

    def load(self, worker: FakeWorker, error: str = "", **timings: float) -> None:
        """`worker` has loaded the weights it was told to load, or could not."""
        told = worker.updates.pop(0)
        if not error:
            worker.version, worker.path = told.version, told.path
        reply = m.WeightsLoaded(worker.name, told.version, told.published_at, timings=timings, error=error)
        self.core.weights_loaded(reply, self.now)
        self.deliver()

    def done(self, worker: FakeWorker, slot: tuple[int, int], reward: float | None = None) -> None:
        if not worker.work[slot].tokens:
            worker.grow(slot)
        work = worker.work.pop(slot)
        reward = float(self.rng.random() < 0.5) if reward is None else reward
        made = trajectory([version for version, _ in work.tokens], reward, serial=len(self.origin))
        self.origin.append(work.tokens)
        task = work.task
        self.report(m.SampleDone(worker.name, task.group, task.sample, task.attempt, [made]))

    def report(self, message: m.SampleDone) -> None:
        self.results.append(message)
        self.core.sample_done(message, self.now)
        self.deliver()

    def fail(self, worker: FakeWorker, slot: tuple[int, int], error: str = "verifier_timeout") -> None:
        task = worker.work.pop(slot).task
        self.core.sample_failed(m.SampleFailed(worker.name, task.group, task.sample, task.attempt, error), self.now)
        self.deliver()

    def publish(self, version: int) -> m.Message:
        self.weights.setdefault(version, f"{version} of life {self.incarnation}.{self.core.lives}")
        self.publications += 1
        reply = self.core.publish(manifest(version, self.weights[version], float(self.publications)), self.now)
        if isinstance(reply, m.Published):
            self.journal_now()
            self.version = version
            if (batch := self.batches.pop(version - 1, None)) is not None:
                self.consumed += [(version - 1, group) for group in batch.groups]
        self.deliver()
        return reply

    def get_batch(self, version: int) -> m.Message:
        reply = self.core.get_batch(version, self.now)
        if isinstance(reply, m.Batch):
            if version not in self.batches:
                self.journal_now()
            first = self.batches.setdefault(version, reply)
            assert m.encode(first) == m.encode(reply), "asked again, another batch"
        self.deliver()
        return reply

    def kill_controller(self) -> None:
        """The controller is killed, and the next one takes over from the journal; workers and trainer live on."""
        self.core = self.new_core()
        self.journal = Journal(self.folder.name)
        self.journal.recover(self.core, self.now)
        assert self.core.version == self.version, "what was acknowledged is forgotten"
        assert set(self.core.handed) == set(self.batches), "a batch that the trainer holds is forgotten"
        for worker in self.workers.values():
            self.core.hello(worker.hello(), self.now)
        self.deliver()

    def journal_now(self) -> None:
        self.spool()
        self.journal.write(self.core)

    def spool(self) -> None:
        for group in self.core.just_finished:
            self.journal.spool(group)
        self.core.just_finished.clear()

    # --- Checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint(self, version: int) -> tuple[int, bytes, list]:
        reply = self.core.get_state(version)
        assert isinstance(reply, m.State), reply
        consumed = self.consumed + [
            (step, group) for step, batch in self.batches.items() if step < version for group in batch.groups
        ]
        return version, reply.data, consumed

    def resume(self, saved: tuple[int, bytes, list], new_controller: bool) -> None:
        """The trainer goes back to a checkpoint, with the same controller or (both were killed) another."""
        version, data, consumed = saved
        if new_controller:
            self.core = self.new_core()
            for worker in self.workers.values():
                self.core.hello(worker.hello(), self.now)
        reply = self.core.set_state(m.SetState(version=version, data=data), self.now)
        assert reply == m.Published(version=version), reply
        self.journal_now()
        self.deliver()
        self.consumed, self.batches, self.version = list(consumed), {}, -1
        self.weights = {number: path for number, path in self.weights.items() if number <= version}
        assert self.publish(version) == reply

    def load_all(self, worker: FakeWorker, publish: int) -> None:
        self.publish(publish)
        while worker.updates:
            self.load(worker)

    # --- Whole stretches -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Every worker loads what it should and finishes everything it has, until nothing is left to do."""
        for _ in range(10_000):
            for worker in self.workers.values():
                if worker.updates:
                    self.load(worker)
                    break
                if worker.work:
                    self.done(worker, min(worker.work, key=lambda slot: (slot[0] >= 0, abs(slot[0]), slot[1])))
                    break
            else:
                return
        raise AssertionError("workers never run out of work")

    def train(self, steps: int) -> bool:
        """Training steps with workers that always keep up; False when the data is used up before."""
        for _ in range(steps):
            reply = self.get_batch(self.version)
            for _ in range(100):
                if isinstance(reply, m.Batch):
                    break
                self.settle()
                self.advance(15.0)
                reply = self.get_batch(self.version)
            if self.stopped:
                return False
            assert isinstance(reply, m.Batch), f"no batch although a worker lives: {reply}"
            assert isinstance(self.publish(self.version + 1), m.Published)
            if not reply.groups:
                return False
        return True

    def audit(self) -> None:
        """The promises about what was consumed."""
        eta, batch_size = self.config.max_staleness, self.config.batch_size
        for step, group in self.consumed:
            assert step - group.oldest_version <= eta, f"group {group.group} is over age in step {step}"
            assert len(group.samples) == self.config.group_size
            for made in (t for sample in group.samples for t in sample):
                for version, path in self.origin[int(made.metrics["serial"])]:
                    assert self.weights[version] == path, "tokens of weights that the trainer has lost"
        numbers = Counter(group.group for _, group in self.consumed)
        visits = Counter((group.epoch, group.record_index) for _, group in self.consumed)
        assert max(numbers.values(), default=1) == 1, "a group was consumed twice"
        assert max(visits.values(), default=1) == 1, "a prompt was consumed twice in an epoch"
        sizes = Counter(step for step, _ in self.consumed)
        assert all(size == batch_size for step, size in sizes.items() if step != max(sizes)), "a short batch"
        tasks = [work.task for worker in self.workers.values() for work in worker.work.values()]
        running = {(task.group, task.sample): task.attempt for task in tasks if task.group >= 0}
        ledger = self.core.ledger
        book = {
            (group.number, i): sample.attempt
            for group in ledger.open.values()
            for i, sample in enumerate(group.samples)
            if sample.worker in self.workers
        }
        assert running == book, "workers and ledger disagree"
        for epoch, fate in ledger.fate.items():
            alive = [g.prompt for g in (*ledger.open.values(), *self.core.buffer.groups.values())]
            alive += [*ledger.again, *(g.prompt for groups in self.core.handed_groups.values() for g in groups)]
            indices = sorted(prompt.index for prompt in alive if prompt.epoch == epoch)
            assert indices == [i for i, code in enumerate(fate) if code == 1], "a prompt is lost, or there twice"
