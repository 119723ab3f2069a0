"""Situations that the tests of the controller begin with."""

from areal_jax.controller.config import ControllerConfig


def config(**changes):
    return ControllerConfig(**({"batch_size": 2, "group_size": 2, "max_staleness": 1, "shuffle": False} | changes))


def start(world, name="a", slots=8):
    worker = world.join(name, slots)
    if world.version < 0:
        world.publish(0)
    while worker.updates:
        world.load(worker)
    return worker


def running(world):
    return sorted({slot[0] for worker in world.workers.values() for slot in worker.work})


def finish(world, worker, *groups, reward=None):
    for group in groups:
        for slot in sorted(slot for slot in worker.work if slot[0] == group):
            world.done(worker, slot, reward)


def numbers(batch):
    return [group.group for group in batch.groups]
