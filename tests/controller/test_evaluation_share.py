"""An evaluation takes half of the slots of a quarter of the workers: generation and training go on meanwhile."""

import pytest

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.report import Telemetry

from .simulation import World, trajectory


def make(names: str, prompts: int = 50, epochs: int = 0):
    """A world whose workers of eight slots have version 0, and an evaluation of 32 problems under way."""
    config = ControllerConfig(batch_size=4, group_size=2, max_staleness=7, shuffle=False, epochs=epochs)
    world = World(config, prompts, evals=32)
    workers = [world.join(name, slots=8) for name in names]
    world.publish(0)
    while any(worker.updates for worker in workers):
        for worker in workers:
            if worker.updates:
                world.load(worker)
    world.core.evaluate(0, 0.0)
    world.deliver()
    return world, workers


def kinds(worker) -> tuple[int, int]:
    """(samples for training, samples of an evaluation) that `worker` runs."""
    evaluating = sum(group < 0 for group, _ in worker.work)
    return len(worker.work) - evaluating, evaluating


def finish_training(world, worker):
    for slot in sorted(slot for slot in worker.work if slot[0] >= 0):
        world.done(worker, slot)


def test_one_worker_goes_on_generating_while_it_evaluates():
    world, (a,) = make("a")
    finish_training(world, a)
    training, evaluating = kinds(a)
    assert evaluating == 4 and training > 0


def test_one_of_two_workers_evaluates_and_the_other_gets_new_weights_at_once():
    world, (a, b) = make("ab")
    finish_training(world, a)
    finish_training(world, b)
    assert kinds(a)[1] > 0 and kinds(b)[1] == 0 and kinds(b)[0] > 0
    world.get_batch(0)
    world.publish(1)
    assert [update.version for update in b.updates] == [1] and not a.updates


def test_where_nothing_is_left_to_train_on_all_workers_evaluate():
    world, (a, b) = make("ab", prompts=4, epochs=1)
    for _ in range(4):
        finish_training(world, a)
        finish_training(world, b)
    assert kinds(a) == (0, 10) and kinds(b) == (0, 10)


def test_an_evaluation_of_which_every_sample_failed_has_no_accuracy():
    """Zero would be said of the model; it is the verifier that failed."""
    world = World(ControllerConfig(batch_size=2, group_size=2, max_staleness=0), 20, evals=2)
    worker = world.join("a", slots=12)
    world.publish(0)
    world.load(worker)
    world.core.evaluate(0, 0.0)
    world.deliver()
    while failing := [slot for slot in worker.work if slot[0] < 0]:
        world.fail(worker, failing[0])
    result = world.core.evaluate(0, 0.0)
    assert (result.accuracy, result.samples, result.failed) == (None, 0, 2)


def test_the_rate_of_a_step_is_of_the_samples_that_came_and_not_of_the_last_heartbeat():
    telemetry, core = Telemetry(0.0), World(ControllerConfig(batch_size=2, group_size=2), 20).core
    telemetry.generated["tokens_generated"] = 0.0  # as said by a worker before it began

    def rate(now):
        return telemetry.batch(core, 0, [], 0, now)["perf/gen_tokens_per_s"]

    for seconds in (1.0, 1.25):
        telemetry.sample([trajectory([0] * 50)])
        assert rate(seconds) == pytest.approx({1.0: 50, 1.25: 200}[seconds])
    assert rate(2.0) == 0.0
