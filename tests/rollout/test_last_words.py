"""A worker that has lost its controller ends within its limit, and says who is gone and what was heard of it last."""

import dataclasses
import logging

from worlds import World, play

from areal_jax.rollout.worker import CONTROLLER_LOST
from areal_jax.transport.client import Client
from areal_jax.transport.server import Server


def test_a_worker_without_a_controller_ends_with_its_last_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def story(world):
        await world.welcome()
        world.worker.settings = dataclasses.replace(world.worker.settings, controller_limit=0.2)
        world.controller.close()
        assert await world.running == CONTROLLER_LOST

    play(World(tmp_path), story)
    assert "no connection to the controller for 0.2 s; it last said UpdateWeights, " in caplog.text


def test_one_that_was_never_answered_says_so(tmp_path):
    async def story(_):
        async with Server("tcp://127.0.0.1:*", "mute", tmp_path), Client("a", tmp_path, server="mute") as client:
            assert client.last_word == "it has never said anything"

    play(World(tmp_path), story)
