"""Ten thousand damaged messages at the guard and at a socket: refused and counted, and nothing else happens."""

import asyncio

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from areal_jax.transport import messages as m
from areal_jax.transport import wire
from areal_jax.transport.sockets import Client, Server

from .hostile import REAL, malformed

MANY = dict(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("message", REAL, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message):
    again = m.decode(m.encode(message))
    assert type(again) is type(message) and m.encode(again) == m.encode(message)


def test_the_guard_opens_messages_and_refuses_the_rest():
    seen = {"refused": 0, "opened": 0}

    @settings(max_examples=500, derandomize=True, **MANY)
    @given(st.lists(malformed(), min_size=20, max_size=30))
    def attack(batch):
        guard = wire.Guard(max_bytes=10_000, mute_after=1000)
        for frames in batch:
            opened = guard.open(b"peer", frames)
            if opened is not None:
                assert isinstance(opened[0], m.Message)
                assert m.decode(m.encode(opened[0])) is not None
        assert guard.accepted + guard.refused.total() == len(batch)
        seen["refused"] += guard.refused.total()
        seen["opened"] += guard.accepted

    attack()
    assert seen["refused"] > 9_000, seen


def test_arrays_that_lie_about_themselves_are_refused():
    def sent(dtype, shape, data):
        raw = msgspec.msgpack.decode(m.encode(REAL[6]))
        raw["trajectories"][0]["tokens"] = [dtype, shape, data]
        return msgspec.msgpack.encode(raw)

    assert m.decode(sent("int32", [1], b"\0\0\0\0")).trajectories[0].tokens.tolist() == [0]
    assert m.decode(sent("int32", [0], b"")).trajectories[0].tokens.shape == (0,)
    for lie in (
        ("object", [1], b"\0" * 8),
        ("int32", [2], b"\0" * 4),
        ("int32", [-1], b"\0" * 4),
        ("int32", [2**63, 2**63], b""),
        ("int32", [0] * 100_000 + [2**60] * 1000, b""),
        ("int32", ["1"], b"\0" * 4),
        ("int32", 4, b"\0" * 4),
        ("int32", [1], "aaaa"),
        ({"a": 1}, [1], b"\0" * 4),
    ):
        with pytest.raises(msgspec.MsgspecError):
            m.decode(sent(*lie))


def test_a_socket_under_attack_serves_its_clients(tmp_path):
    frames = []

    @settings(max_examples=60, derandomize=True, **MANY)
    @given(st.lists(malformed(), min_size=20, max_size=30))
    def collect(batch):
        frames.extend(batch)

    collect()

    async def body():
        context = zmq.Context()
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            for start in range(0, len(frames), 100):  # a muted peer comes again under another name
                sock = context.socket(zmq.DEALER)
                sock.setsockopt(zmq.IDENTITY, b"evil/%d" % start)
                sock.connect(server.endpoint)
                for parts in frames[start : start + 100]:
                    sock.send_multipart(parts or [b""])
            async with Client("good", tmp_path) as client:
                for i in range(50):
                    await client.send(m.Heartbeat(name="good", phase=str(i)))
                phases = []
                async for peer, message in server:
                    if peer.name == "good":
                        phases.append(message.phase)
                        if len(phases) == 50:
                            break
                assert phases == [str(i) for i in range(50)]
            while server.guard.accepted + server.guard.refused.total() < len(frames) + 50:
                waiting = asyncio.create_task(server.receive())
                await asyncio.wait([waiting], timeout=0.05)
                waiting.cancel()
            assert server.guard.refused.total() > 0.85 * len(frames)
        context.destroy(linger=0)

    asyncio.run(asyncio.wait_for(body(), 60))
