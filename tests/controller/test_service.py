"""The controller as a process among processes: fake workers and a fake trainer over real sockets."""

import asyncio

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core
from areal_jax.controller.service import Service
from areal_jax.transport import messages as m
from areal_jax.transport.endpoints import make_keys
from areal_jax.transport.sockets import Client, Server, SyncClient

from .simulation import manifest, trajectory


class NetWorker:
    """A rollout worker that answers each task with one token of its version."""

    def __init__(self, name, workdir):
        self.name, self.workdir, self.version, self.seen = name, workdir, -1, []
        self.hello = lambda: m.Hello(
            role="rollout", name=name, host="h", pid=hash(name) % 1000, slots=4, version=self.version
        )

    async def run(self):
        async with Client(self.name, self.workdir, hello=self.hello) as client:
            beats = asyncio.create_task(self.beat(client))
            async for message in client:
                self.seen.append(message)
                match message:
                    case m.Assign():
                        for task in message.tasks:
                            done = [trajectory([self.version], float(task.sample))]
                            await client.send(m.SampleDone(self.name, task.group, task.sample, task.attempt, done))
                    case m.UpdateWeights():
                        self.version = message.manifest.version
                        await client.send(m.WeightsLoaded(name=self.name, version=self.version))
                    case m.Shutdown():
                        await client.send(m.Goodbye(name=self.name))
                        client.close(flush=1.0)
            beats.cancel()

    async def beat(self, client):
        while True:
            clock = {"generating": 1.0}
            await client.send(m.Heartbeat(name=self.name, phase="generating", clock=clock))
            await asyncio.sleep(0.05)


def train(workdir, steps):
    """A trainer: evaluate, then for each step take a batch and publish."""
    consumed, replies = [], []
    with SyncClient("trainer-0", workdir) as client:

        def ask(message):
            for _ in range(100):
                reply = client.request(message, 10)
                if not isinstance(reply, m.NotReady):
                    return reply
            raise AssertionError(reply)

        replies.append(ask(m.Publish(manifest(0))))
        replies.append(ask(m.Evaluate(0)))
        for step in range(steps):
            consumed.append(ask(m.GetBatch(step)))
            replies.append(ask(m.Publish(manifest(step + 1))))
        replies.append(ask(m.GetState(steps)))
        replies.append(ask(m.GetStatus()))
        replies.append(ask(m.Finish()))
    return consumed, replies


def test_a_whole_run_over_sockets(tmp_path):
    make_keys(tmp_path)
    config = ControllerConfig(batch_size=4, group_size=2, max_staleness=2, heartbeat_seconds=0.1)
    records = [{"prompt": str(i)} for i in range(16)]

    async def body():
        core = Core(config, records, records[:3], now=asyncio.get_running_loop().time())
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, "test", asyncio.get_running_loop().time)
            workers = [NetWorker(f"rollout-{i}", tmp_path) for i in range(2)]
            running = asyncio.gather(service.run(), *(worker.run() for worker in workers))
            consumed, replies = await asyncio.to_thread(train, tmp_path, 6)
            assert (await running)[0] is None
            return consumed, replies, workers

    consumed, replies, workers = asyncio.run(asyncio.wait_for(body(), 60))
    assert [batch.version for batch in consumed] == list(range(6))
    assert all(len(batch.groups) == 4 for batch in consumed)
    seen = [(group.epoch, group.record_index) for batch in consumed for group in batch.groups]
    assert len(set(seen)) == len(seen) == 24
    evaluation, status, final = replies[1], replies[-2].data, replies[-1].data
    assert (evaluation.version, evaluation.samples, evaluation.failed) == (0, 3, 0)
    assert status["version"] == 6 and set(status["roles"]) == {"rollout-0", "rollout-1"}
    assert final["trained_samples"] == 48 and final["max_staleness"] <= 2
    assert sum(final["staleness_histogram"].values()) == 24
    assert {"rollout_idle_fraction", "generated_tokens_per_second", "dropped_stale"} <= set(final)
    assert all(worker.seen[-1] == m.Shutdown(reason="the run is over") for worker in workers)
    assert consumed[0].report["queue/depth"] >= 4
