"""Memory, descriptors and threads stay flat over thousands of updates; the weights alone: tests/weights.

Whole runs: tools/soak.py.
"""

import asyncio
import threading

import numpy as np
import psutil
import pytest

from areal_jax.models import to_hf
from areal_jax.rollout.jax_engine import hf_loader
from areal_jax.transport import messages as m
from areal_jax.transport.endpoints import make_keys
from areal_jax.transport.sockets import Client, Server, SyncClient
from areal_jax.weights import Publisher
from tests.rollout import engines

MEGABYTE = 1 << 20


class Growth:
    """What this process has, against what it had at the first look."""

    def __init__(self):
        self._me, self._first = psutil.Process(), None

    def look(self):
        now = self._me.num_fds(), threading.active_count(), self._me.memory_info().rss
        self._first = self._first or now
        return [b - a for a, b in zip(self._first, now, strict=True)]


def test_peers_that_come_and_go_leave_nothing_in_a_server(tmp_path):
    """Hundreds of lives of workers and trainers, encrypted, with requests and large messages in between."""
    make_keys(tmp_path)
    growth = Growth()
    state = m.State(version=1, data=bytes(MEGABYTE))

    async def serve(server):
        async for peer, message in server:
            if isinstance(message, m.GetState):
                await server.send(peer, state)

    def ask(i):
        with SyncClient(f"trainer-{i}", tmp_path) as client:
            for _ in range(3):
                assert client.request(m.GetState(version=1), 10) == state

    async def body():
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            serving = asyncio.create_task(serve(server))
            for i in range(300):
                if i % 2:
                    await asyncio.to_thread(ask, i)
                else:
                    async with Client(f"rollout-{i}", tmp_path) as client:
                        await client.send(m.GetState(version=1))
                        assert await client.receive() == state
                if i == 100:
                    growth.look()
            serving.cancel()
            return growth.look()

    descriptors, threads, memory = asyncio.run(asyncio.wait_for(body(), 120))
    assert descriptors <= 2 and threads <= 2  # one peer's, that is just being closed
    assert memory < 24 * MEGABYTE


@pytest.mark.slow
def test_an_engine_that_takes_new_weights_hundreds_of_times_stays_flat(tmp_path):
    """Publisher, shared memory, receiver and swap, while the engine generates."""
    growth = Growth()

    async def body():
        with Publisher(tmp_path, shared_memory=tmp_path) as publisher:

            def publish(version):
                return publisher.publish(version, to_hf(engines.MODEL, engines.params_of(version % 3), "float32"))

            engine = engines.make_engine(load=hf_loader(engines.MODEL, "float32", 10.0))
            await engine.start(publish(0))
            wanted = engines.requests(4)
            for version in range(1, 601):
                running = [asyncio.create_task(engine.generate(request)) for request in wanted]
                await engine.update_weights(publish(version))
                await asyncio.gather(*running)
                if version == 200:
                    growth.look()
            grown, stats = growth.look(), engine.stats()
            await engine.close()
            return grown, stats

    (descriptors, threads, memory), stats = asyncio.run(asyncio.wait_for(body(), 300))
    assert stats["weight_updates"] == 600 and stats["recompiles_after_warmup"] == 0
    assert descriptors <= 0 and threads <= 0
    assert memory < 24 * MEGABYTE, np.round(memory / MEGABYTE, 1)
