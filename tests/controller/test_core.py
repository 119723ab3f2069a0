"""The controller's decisions, event by event."""

from areal_jax.controller.config import ControllerConfig
from areal_jax.transport import messages as m

from .simulation import World


def config(**changes):
    return ControllerConfig(**({"batch_size": 2, "group_size": 2, "max_staleness": 1, "shuffle": False} | changes))


def running(world):
    return sorted({slot[0] for worker in world.workers.values() for slot in worker.work})


def test_the_first_weights_come_before_the_first_task():
    world = World(config(), 10)
    worker = world.join("a")
    assert not worker.work and not worker.updates
    world.publish(0)
    assert [u.version for u in worker.updates] == [0] and not worker.work
    world.load(worker)
    assert running(world) == [0, 1, 2], "room for five samples: two groups of two, and part of a third"


def test_a_batch_is_the_oldest_groups_and_the_same_when_asked_again():
    world = World(config(), 10)
    a = world.join("a", slots=8)
    world.publish(0)
    world.load(a)
    assert running(world) == [0, 1, 2, 3], "(η + version + 1)·B = 4 groups"
    for group in (3, 1, 2):
        world.done(a, (group, 0))
        world.done(a, (group, 1))
    batch = world.get_batch(0)
    assert [group.group for group in batch.groups] == [1, 2]
    assert world.get_batch(0) == batch
    assert isinstance(world.get_batch(2), m.Refused)
    assert running(world) == [0], "the gate opens with the version, not with the batch"
    assert world.publish(1) == m.Published(version=1)
    assert running(world) == [0], "a worker with version 0 may not run group number 5: it would be too old in batch 2"
    world.load(a)
    assert running(world) == [0, 4, 5]
    assert world.publish(1) == m.Published(version=1), "repeated requests are answered alike"
    assert isinstance(world.get_batch(0), m.Refused)
    world.audit()
