"""Thousands of random histories of the core: nothing over age, nothing twice, nothing lost, and always a way on."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_jax.controller.config import ControllerConfig
from areal_jax.transport import messages as m

from .simulation import World

configs = st.builds(
    ControllerConfig,
    batch_size=st.integers(1, 3),
    group_size=st.integers(1, 3),
    max_staleness=st.integers(0, 3),
    over_age=st.sampled_from(["drop", "wait"]),
    max_concurrent=st.integers(0, 4),
    dynamic_filter=st.booleans(),
    epochs=st.integers(0, 2),
    heartbeat_limit=st.just(30.0),
    progress_limit=st.just(1e9),
    max_attempts=st.integers(1, 2),
).filter(lambda config: config.group_size > 1 or not config.dynamic_filter)
lengths = st.just(0) | st.integers(1, 8)  # steps of the run; 0: as many as there is data for
# An event is a kind and a number that picks among what is possible; frequent kinds are listed more often.
OFTEN = ["done"] * 40 + ["grow"] * 10 + ["load"] * 16 + ["step"] * 16 + ["join", "publish"] * 2
RARE = ["join", "batch", "ahead", "die", "leave", "restart", "rejoin", "fail", "refuse", "late", "wait", "cut"]
RARE += ["evaluate", "checkpoint", "resume", "resume_all", "killed"]
KINDS = OFTEN + RARE
events = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**16)), min_size=20, max_size=300)


class History:
    def __init__(self, config, prompts, rolling, steps):
        self.world = World(config, prompts, evals=2, rolling=rolling, steps=steps)
        self.saved = None
        self.world.load_all(self.world.join("a", slots=3), publish=0)

    def step(self, kind, pick):
        world = self.world
        names = sorted(world.workers)
        worker = world.workers[names[pick % len(names)]] if names else None
        work = sorted(worker.work) if worker else []
        slot = work[pick // 7 % len(work)] if work else None
        match kind:
            case "join" if len(names) < 3:
                name = next(n for n in ("a", "b", "c") if n not in names)
                world.join(name, slots=1 + pick % 5)
            case "restart" if worker:  # a new process under the old name, before the old one is found dead
                world.join(worker.name, slots=1 + pick % 5)
            case "die" if worker:
                world.die(worker.name)
            case "leave" if worker:
                world.leave(worker.name)
            case "rejoin" if worker:  # the connection broke; the same process, with some of its work lost
                if slot:
                    del worker.work[slot]
                worker.updates.clear()
                world.rejoin(worker)
            case "cut" if worker:  # no message reaches it; then it is there again, or another, or nobody
                away = world.cut(worker.name, seconds=pick // 4 % 80)
                if slot:
                    del worker.work[slot]
                worker.updates.clear()
                if pick % 4 < 2:
                    world.rejoin(away)
                elif pick % 4 == 2:
                    world.join(away.name, slots=1 + pick % 5)
                else:
                    world.core.goodbye(away.name, world.now)
                    world.deliver()
            case "grow" if slot:
                worker.grow(slot)
            case "done" if slot:
                world.done(worker, slot)
            case "fail" if slot:
                world.fail(worker, slot)
            case "late" if world.results:
                message = world.results[pick % len(world.results)]
                if world.core.knows(message.name):
                    world.report(message)
            case "load" if worker and worker.updates:
                world.load(worker)
            case "refuse" if worker and worker.updates:
                world.load(worker, error="checksum")
            case "batch" if world.version >= 0 and self.more(world.version):
                world.get_batch(world.version)
            case "ahead" if world.version in world.batches and self.more(world.version + 1):
                # the next batch is wanted while weights are published
                world.get_batch(world.version + 1)
            case "publish":
                if world.version < 0 or world.version in world.batches:
                    assert isinstance(world.publish(world.version + 1), m.Published) or world.stopped
                else:
                    assert isinstance(world.publish(world.version + 1), m.Refused)
            case "step" if world.version in world.batches:
                world.publish(world.version + 1)
            case "step" if world.version >= 0 and self.more(world.version):
                world.get_batch(world.version)
            case "evaluate" if world.version >= 0:
                world.core.evaluate(world.version, world.now)
                world.deliver()
            case "wait":
                world.advance(pick % 20)
            case "checkpoint" if world.version >= 0:
                newer = world.version in world.batches and pick % 2
                self.saved = world.checkpoint(world.version + 1 if newer else world.version)
            case "killed" if not world.stopped:
                world.kill_controller()
            case "resume" | "resume_all" if self.saved and not world.stopped:
                world.resume(self.saved, new_controller=kind == "resume_all")

    def more(self, step):
        """Whether the trainer makes this step."""
        return not self.world.steps or step < self.world.steps

    def check(self):
        self.world.audit()
        core = self.world.core
        if core.buffer.wait:
            assert not core.counters["dropped_stale"], "thrown away although over_age='wait'"
        if core.version >= 0 and not core.ledger.exhausted():
            assert core.count <= (self.world.config.max_staleness + core.version + 1) * self.world.config.batch_size
        if self.world.steps:
            assert core.count <= self.world.steps * self.world.config.batch_size, "made for no step of this run"

    def finish(self):
        """However it went: with one good worker everything comes to a good end."""
        world = self.world
        for name in sorted(world.workers):
            world.leave(name)
        world.join("z", slots=3)
        if world.version < 0:
            world.publish(0)
        if world.stopped:
            return
        if not world.config.epochs and not world.steps:
            world.train(3)
        else:
            while self.more(world.version) and world.train(1) and not world.stopped:
                pass
            if not self.more(world.version):
                assert len({step for step, _ in world.consumed}) <= world.steps
            elif not world.stopped:
                ledger = world.core.ledger
                assert len(ledger.epochs_done) == world.config.epochs and not ledger.fate
                assert sum(ledger.totals.values()) == len(world.records) * world.config.epochs
                assert ledger.totals["consumed"] == len(world.consumed)
                assert ledger.totals["filtered"] == world.core.counters["filtered"]
                assert ledger.totals["quarantined"] == world.core.counters["quarantined"]
        world.audit()


def run(config, prompts, rolling, steps, history):
    life = History(config, prompts, rolling, steps)
    for kind, pick in history:
        life.step(kind, pick)
        life.check()
    life.finish()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs, prompts=st.integers(1, 9), rolling=st.booleans(), steps=lengths, history=events)
def test_promises_hold_in_every_interleaving(config, prompts, rolling, steps, history):
    run(config, prompts, rolling, steps, history)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs, prompts=st.integers(1, 12), rolling=st.booleans(), steps=lengths, history=events)
def test_promises_hold_in_thousands_of_interleavings(config, prompts, rolling, steps, history):
    run(config, prompts, rolling, steps, history)
