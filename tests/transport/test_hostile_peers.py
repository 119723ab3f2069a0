"""Ten thousand malformed messages at every other socket: reward services, the weights' byte server, and clients.

(The controller's is in tests/controller/test_service.py.) Nothing crashes, hangs or changes; what is right still works.
"""

import asyncio
import threading

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from areal_jax.transport import messages as m
from areal_jax.transport import wire
from areal_jax.transport.endpoints import write_endpoint
from areal_jax.transport.errors import RequestTimeout
from areal_jax.transport.sockets import Client, SyncClient
from areal_jax.weights import Publisher, open_version, tcp
from tests.rewards import test_service as rewards

from .hostile import malformed, opens

DAMAGED = 2_100  # different messages; sent five times each
TIMES = 5


@pytest.fixture(scope="module")
def frames():
    found = []

    @settings(
        max_examples=110, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip
    @given(st.lists(malformed(), min_size=20, max_size=30))
    def collect(batch):
        found.extend(parts or [b""] for parts in batch if not opens(parts))

    collect()
    assert len(found) >= DAMAGED
    return found[:DAMAGED]


def attack(context, endpoint, frames):
    """Send all frames `TIMES` times over; every 90 messages another peer speaks, since a peer may be muted.

    Returns the sockets, which must live until all has arrived.
    """
    sockets = []
    for time in range(TIMES):
        for start in range(0, len(frames), 90):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.IDENTITY, b"evil/%d.%d" % (time, start))
            sock.setsockopt(zmq.SNDHWM, 0)
            sock.setsockopt(zmq.LINGER, 0)
            sock.connect(endpoint)
            for parts in frames[start : start + 90]:
                sock.send_multipart(parts)
            sockets.append(sock)
    return sockets


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_a_reward_service_refuses_and_counts_them_and_goes_on_judging(tmp_path, frames, context):
    async def story(world):
        pid = world.process.pid
        held = attack(context, (tmp_path / "endpoints" / "rewards-0").read_text(), frames)
        replies = await world.ask((1, "\\boxed{2}"), (2, "\\boxed{3}"))  # while they arrive
        assert [replies[1].reward, replies[2].reward] == [1.0, 0.0]

        def all_done(beat):
            refused = sum(n for name, n in beat.counters.items() if name.startswith("refused_"))
            return refused == TIMES * len(frames) and beat.counters.get("verified") == 2.0

        beat = await world.hear(m.Heartbeat, all_done)
        assert TIMES * len(frames) > 10_000 and beat.counters["refused_malformed"] > 5_000
        assert "failed" not in beat.counters
        replies = await world.ask((3, "\\boxed{2}"))
        assert replies[3].reward == 1.0 and world.process.pid == pid and world.process.returncode is None and held

    rewards.run(tmp_path, story)


def test_the_byte_server_of_the_weights_answers_none_of_them(tmp_path, frames, context):
    for name in ("run", "here", "there"):
        (tmp_path / name).mkdir()
    with Publisher(tmp_path / "run", transport="tcp", shared_memory=tmp_path / "here") as publisher:
        weights = np.arange(300_000, dtype=np.float32)
        manifest = publisher.publish(0, [("w", weights)])
        small = [parts for parts in frames if max(map(len, parts)) <= 1000]  # a larger one ends its connection unread
        small = [parts for parts in small if len(parts) != 2 or len(parts[1]) != tcp._REQUEST.size]
        held = attack(context, manifest.url, small)
        while publisher._server.refused < TIMES * len(small):
            pass
        assert TIMES * len(small) > 9_500
        held += attack(context, manifest.url, [parts for parts in frames if max(map(len, parts)) > 1000] * 5)
        options = {"workdir": tmp_path / "run", "host": "there", "shared_memory": tmp_path / "there"}
        with open_version(manifest, **options) as version:
            np.testing.assert_array_equal(version["w"], weights)
    assert held


class Liar:
    """A server that sends everything damaged, and one right message for each request that it is told to answer."""

    def __init__(self, context, workdir, frames):
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind("tcp://127.0.0.1:*")
        write_endpoint(workdir, "controller", self.socket.last_endpoint.decode())
        self.frames, self.sequence = frames, 0

    def lie(self, peer: bytes) -> None:
        for parts in self.frames * TIMES:
            self.socket.send_multipart([peer, *parts])

    def answer(self, peer: bytes, request: int, message: m.Message) -> None:
        self.sequence += 1
        self.socket.send_multipart([peer, *wire.frames(1, self.sequence, request, message, wire.MAX_BYTES)])


def test_a_workers_connection_takes_the_one_right_message_among_them(tmp_path, frames, context):
    liar = Liar(context, tmp_path, frames)

    async def body():
        async with Client("rollout-0", tmp_path, hello=lambda: m.GetStatus()) as client:
            peer = (await asyncio.to_thread(liar.socket.recv_multipart))[0]
            liar.lie(peer)
            liar.answer(peer, 0, m.Shutdown(reason="right"))
            assert await client.receive() == m.Shutdown(reason="right")
            assert client.guard.refused.total() == TIMES * len(frames) and client.guard.accepted == 1

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_trainers_request_gets_its_answer_after_them_and_not_one_of_them(tmp_path, frames, context):
    liar = Liar(context, tmp_path, frames)

    def serve():
        peer, header, _ = liar.socket.recv_multipart()
        liar.lie(peer)
        liar.answer(peer, wire.HEADER.unpack(header)[3] + 1, m.Status(data={"of": "another request"}))
        liar.answer(peer, wire.HEADER.unpack(header)[3], m.Status(data={"of": "this"}))

    thread = threading.Thread(target=serve)
    thread.start()
    with SyncClient("trainer-0", tmp_path, resend=60.0) as client:
        assert client.request(m.GetStatus(), 60.0) == m.Status(data={"of": "this"})
        assert client.guard.refused.total() == TIMES * len(frames) and client.late == 1
        thread.join()
        with pytest.raises(RequestTimeout, match=r"did not answer GetStatus of trainer-0 within 0\.1 s"):
            client.request(m.GetStatus(), 0.1)
