"""The controller as a process among processes: fake workers and a fake trainer over real sockets."""

import asyncio

import zmq
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Send, Stop
from areal_jax.controller.journal import Journal
from areal_jax.controller.service import Service, merged
from areal_jax.transport import messages as m
from areal_jax.transport import wire
from areal_jax.transport.endpoints import make_keys, read_endpoint
from areal_jax.transport.sockets import HELLO_FIRST, Client, Peer, Server, SyncClient
from tests.transport.hostile import malformed, opens

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
                        at = message.manifest.published_at
                        await client.send(m.WeightsLoaded(name=self.name, version=self.version, published_at=at))
                    case m.Shutdown():
                        beats.cancel()
                        await client.send(m.Goodbye(name=self.name))
                        client.close(flush=1.0)

    async def beat(self, client):
        while True:
            clock = {"generating": 1.0}
            await client.send(m.Heartbeat(name=self.name, phase="generating", clock=clock))
            await asyncio.sleep(0.05)


def test_tasks_of_one_worker_go_in_one_message_and_what_is_sent_to_each_keeps_its_order():
    def assign(name, *samples):
        return Send(name, m.Assign(tasks=[m.Task(group=0, sample=i, record={}) for i in samples]))

    cancel, stop = Send("a", m.Cancel(tasks=[(0, 1)])), Stop("enough")
    actions = [assign("a", 1), assign("b", 2), assign("a", 3, 4), cancel, assign("a", 5), stop, assign("a", 6)]
    assert merged(actions) == [assign("a", 1, 3, 4), assign("b", 2), cancel, assign("a", 5, 6), stop]


def train(workdir, steps, between=lambda step: None):
    """A trainer: evaluate, then for each step take a batch and publish; `between` the two, something may happen."""
    consumed, replies = [], []
    with SyncClient("trainer-0", workdir, resend=0.2) as client:

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
            between(step)
            replies.append(ask(m.Publish(manifest(step + 1))))
        replies.append(ask(m.GetState(steps)))
        replies.append(ask(m.GetStatus()))
        replies.append(ask(m.Finish()))
    return consumed, replies


CONFIG = ControllerConfig(batch_size=4, group_size=2, max_staleness=2, heartbeat_seconds=0.1)
RECORDS = [{"prompt": str(i)} for i in range(16)]


async def controller(workdir, incarnation=0):
    """One life of the controller process, as `areal_jax.controller.__main__` lives it."""
    clock = asyncio.get_running_loop().time
    core = Core(CONFIG, RECORDS, RECORDS[:3], incarnation=incarnation, now=clock())
    journal = Journal(workdir)
    recovered = journal.recover(core, clock())
    assert recovered == (incarnation > 0)
    async with Server("tcp://127.0.0.1:*", "controller", workdir) as server:
        return await Service(core, server, clock, journal).run()


def test_a_killed_controller_is_followed_by_one_that_knows_everything(tmp_path):
    """Killed twice in the middle of a step: the run goes on, and every prompt is trained on once per epoch."""
    make_keys(tmp_path)

    async def body():
        loop = asyncio.get_running_loop()
        lives = [loop.create_task(controller(tmp_path))]

        async def kill():
            lives[-1].cancel()
            await asyncio.wait([lives[-1]])
            lives.append(loop.create_task(controller(tmp_path, len(lives))))

        def between(step):
            if step in (2, 4):
                asyncio.run_coroutine_threadsafe(kill(), loop).result(10)

        workers = [asyncio.create_task(NetWorker(f"rollout-{i}", tmp_path).run()) for i in range(2)]
        consumed, replies = await asyncio.to_thread(train, tmp_path, 8, between)
        await asyncio.gather(lives[-1], *workers)
        assert len(lives) == 3 and lives[-1].result() is None
        return consumed, replies[-1].data

    consumed, final = asyncio.run(asyncio.wait_for(body(), 60))
    seen = [(group.epoch, group.record_index) for batch in consumed for group in batch.groups]
    assert len(set(seen)) == len(seen) == 32
    assert final["trained_samples"] == 64 and sum(final["staleness_histogram"].values()) == 32
    assert final["max_staleness"] <= 2
    assert not (tmp_path / "controller").exists(), "the journal goes with the run"


def test_told_to_end_with_all_the_others_the_controller_stays_for_the_trainers_last_checkpoint(tmp_path):
    """Slurm, and the guardian of a killed launcher, end all processes at once; the trainer may be inside a step."""

    async def body():
        loop = asyncio.get_running_loop()
        core = Core(CONFIG, RECORDS, now=loop.time())
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, loop.time)
            running = asyncio.create_task(service.run())
            hello = m.Hello(role="trainer", name="trainer-0", host="h", pid=1)
            async with Client("trainer-0", tmp_path, hello=lambda: hello) as client:
                await client.send(m.Heartbeat(name="trainer-0", phase="training", clock={}))
                while not core.alive("trainer"):
                    await asyncio.sleep(0.01)
                service.end("the controller got SIGTERM")
                done, _ = await asyncio.wait([running], timeout=1.5)
                assert not done, "the controller has left before the trainer"
                state = await asyncio.to_thread(ask_state)
                await client.send(m.Goodbye(name="trainer-0"))
                assert await asyncio.wait_for(running, 10) is None
                return state

    def ask_state():
        with SyncClient("trainer-0-asks", tmp_path) as client:
            return client.request(m.GetState(0), 10)

    assert isinstance(asyncio.run(asyncio.wait_for(body(), 60)), m.State)


def test_a_goodbye_that_comes_after_its_sender_could_not_be_reached_is_taken(tmp_path):
    """The ROUTER knows before the controller that a worker has gone, and its last word is still in the queue."""

    async def body():
        core, peer = Core(CONFIG, RECORDS), Peer(b"rollout-0/1")
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server)
            hello = {"role": "rollout", "name": "rollout-0", "host": "h", "pid": 1, "slots": 4}
            service._handle(peer, m.Hello(**hello))
            await service._act()  # its welcome finds nobody
            assert set(core.unreached) == set(core.missing) == {"rollout-0"}
            beat, goodbye = m.Heartbeat("rollout-0", "generating"), m.Goodbye("rollout-0")
            assert service._handle(peer, beat) == m.Refused(reason=HELLO_FIRST)
            assert service._handle(Peer(b"rollout-0/2"), goodbye) == m.Refused(reason=HELLO_FIRST)
            assert service._handle(peer, goodbye) is None
            assert not core.unreached and not core.missing
            assert service._handle(peer, goodbye) == m.Refused(reason=HELLO_FIRST)
            service._handle(Peer(b"rollout-0/3"), m.Hello(**hello, life=2))
            assert (core.counters["workers_died"], core.counters["workers_left"]) == (0, 1)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_damaged_messages_change_nothing(tmp_path):
    """Thousands of malformed messages, muted peers and strangers' results, while a run goes on beside them."""
    frames = []

    @settings(max_examples=100, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(st.lists(malformed(), min_size=20, max_size=30))
    def collect(batch):
        frames.extend(parts for parts in batch if not opens(parts))

    collect()
    assert len(frames) > 1500

    context = zmq.Context()

    def attack(step):
        for start in range(0, len(frames), 90):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.IDENTITY, b"evil/%d.%d" % (step, start))
            sock.connect(read_endpoint(tmp_path, "controller"))
            for parts in frames[start : start + 90]:
                sock.send_multipart(parts or [b""])
            stranger = m.SampleDone("rollout-0", 0, 0, 1, [trajectory([0], reward=99.0)])
            sock.send_multipart(wire.frames(9, 2**63, 0, stranger, wire.MAX_BYTES))
        with SyncClient("watcher", tmp_path) as watcher:
            while watcher.request(m.GetStatus(), 10).data["refused"].get("malformed", 0) < (step + 1) * len(frames):
                pass

    async def body():
        running = asyncio.create_task(controller(tmp_path))
        workers = [asyncio.create_task(NetWorker(f"rollout-{i}", tmp_path).run()) for i in range(2)]
        consumed, replies = await asyncio.to_thread(train, tmp_path, 5, attack)
        assert await running is None
        await asyncio.gather(*workers)
        return consumed, replies[-1].data

    try:
        consumed, final = asyncio.run(asyncio.wait_for(body(), 100))
    finally:
        context.destroy(linger=0)
    seen = [(group.epoch, group.record_index) for batch in consumed for group in batch.groups]
    assert len(set(seen)) == len(seen) == 20
    samples = [sample for batch in consumed for group in batch.groups for sample in group.samples]
    assert all(sample[0].reward != 99.0 for sample in samples), "a stranger spoke in a worker's name"
    assert final["failed"] == {} and final["workers_died"] == 0
    assert final["refused"]["malformed"] == 5 * len(frames) > 10_000


def test_a_whole_run_over_sockets(tmp_path):
    make_keys(tmp_path)
    async def body():
        core = Core(CONFIG, RECORDS, RECORDS[:3], now=asyncio.get_running_loop().time())
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, asyncio.get_running_loop().time)
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
