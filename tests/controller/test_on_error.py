"""rewards.on_error="stop": the first failure of a verifier ends the run, with its name."""

import pytest

from areal_jax.controller.config import ControllerConfig
from areal_jax.transport import messages as m

from .simulation import World


@pytest.mark.parametrize("error", ["verifier_exception", "verifier_timeout", "sandbox_unavailable"])
@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
def test_the_first_failure_of_a_verifier_ends_the_run_and_that_of_its_service_does_not(error, evaluation):
    world = World(ControllerConfig(batch_size=2, group_size=2, max_staleness=0), 20, evals=2)
    world.core.stop_on_failure = True
    worker = world.join("a", slots=12)
    world.publish(0)
    world.load(worker)
    world.core.evaluate(0, 0.0)
    world.deliver()
    world.fail(worker, min(worker.work), "verifier_unreachable")  # it may come back
    assert world.stopped is None
    world.fail(worker, next(slot for slot in sorted(worker.work) if (slot[0] < 0) == evaluation), error)
    assert "rewards.on_error is 'stop'" in world.stopped and error in world.stopped


def test_a_late_failure_of_a_verifier_does_not_end_the_run():
    world = World(ControllerConfig(batch_size=2, group_size=2, max_staleness=0), 20, evals=2)
    world.core.stop_on_failure = True
    a = world.join("a", slots=12)
    world.publish(0)
    world.load(a)
    world.core.evaluate(0, 0.0)
    world.deliver()
    late = [("a", work.task) for work in a.work.values()]
    assert {task.group < 0 for _, task in late} == {True, False}
    world.die("a")
    b = world.join("b", slots=12)  # gets what a had
    world.load(b)
    for slot in (min(b.work), max(b.work)):
        late.append(("b", b.work[slot].task))
        world.done(b, slot)
    for name, task in late:
        failure = m.SampleFailed(name, task.group, task.sample, task.attempt, "verifier_timeout")
        world.core.sample_failed(failure, world.now)
    assert world.stopped is None and not world.core.failed
    assert world.core.counters["late_results"] + world.core.counters["duplicate_results"] == len(late)
