"""Sockets deliver typed messages, follow a restarted server, and let nothing else through."""

import asyncio
import gc
import os
import threading
import time

import pytest
import zmq

from areal_jax.transport import wire
from areal_jax.transport.endpoints import make_keys, read_endpoint
from areal_jax.transport.errors import (
    EndpointMissing,
    MessageTooLarge,
    RequestRefused,
    RequestTimeout,
)
from areal_jax.transport.messages import (
    GetBatch,
    GetStatus,
    Goodbye,
    Heartbeat,
    Hello,
    NotReady,
    Refused,
    SetState,
    Status,
    Welcome,
)
from areal_jax.transport.sockets import HELLO_FIRST, Client, HeartbeatThread, Peer, Server, SyncClient

LOOPBACK = "tcp://127.0.0.1:*"
WELCOME = Welcome(heartbeat_seconds=1.0)


def hello(name="rollout-0"):
    return Hello(role="rollout", name=name, host="h", pid=1)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.fixture(params=[False, True], ids=["plain", "curve"])
def workdir(request, tmp_path):
    if request.param:
        make_keys(tmp_path)
    return tmp_path


def test_both_directions(workdir):
    async def body():
        async with Server(LOOPBACK, "controller", workdir) as server, Client("a", workdir, hello=hello) as client:
            peer, message = await server.receive()
            assert message == hello() and peer.name == "a"
            assert await server.send(peer, WELCOME)
            assert await client.receive() == WELCOME
            await client.send(Goodbye(name="a"))
            assert await server.receive() == (peer, Goodbye(name="a"))
            while client.disconnected_for:  # ZeroMQ's word of the connection may come after what came over it
                await asyncio.sleep(0)

    run(body())


def serve_in_thread(workdir, answer, address=LOOPBACK):
    """A server on its own event loop; `answer(message)` is the reply. Returns a function that stops it."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def body():
        async with Server(address, "controller", workdir) as server:
            ready.set()

            async def serve():
                async for peer, message in server:
                    for reply in answer(message):
                        await server.send(peer, reply)

            task = asyncio.create_task(serve())
            await stop.wait()
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(body()), daemon=True)
    thread.start()
    assert ready.wait(10)

    def end():
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()

    return end


def test_request_and_reply_survive_a_restart_of_the_server(workdir):
    seen = []

    def answer(message):
        seen.append(message)
        return [NotReady(waiting_for=str(message.version))]

    end = serve_in_thread(workdir, answer)
    with SyncClient("trainer-0", workdir, resend=0.2) as client:
        assert client.request(GetBatch(version=1), 10) == NotReady(waiting_for="1")
        first = read_endpoint(workdir, "controller")
        end()
        with pytest.raises(RequestTimeout, match=r"GetBatch of trainer-0 .*it last said NotReady, waiting for 1, "):
            client.request(GetBatch(version=2), 0.3)
        end = serve_in_thread(workdir, answer)
        assert read_endpoint(workdir, "controller") == first, "a restarted server takes its old port"
        assert client.request(GetBatch(version=3), 10) == NotReady(waiting_for="3")
        end()
        blocker = zmq.Context().socket(zmq.DEALER)
        blocker.bind(first)
        end = serve_in_thread(workdir, answer)
        assert read_endpoint(workdir, "controller") != first
        assert client.request(GetBatch(version=4), 10) == NotReady(waiting_for="4"), "it follows to a new port"
        end()
        blocker.context.destroy(linger=0)


def test_a_client_that_was_itself_stopped_does_not_take_its_server_for_dead(workdir):
    """Its clock jumps by an hour before the reply can come."""
    jumps = iter([0.0, 0.0])
    seen = []

    def answer(message):
        seen.append(message)
        return [NotReady(waiting_for="x")] if len(seen) > 1 else []  # the first was lost

    end = serve_in_thread(workdir, answer)
    with SyncClient("trainer-0", workdir, resend=0.2, clock=lambda: time.monotonic() + next(jumps, 3600.0)) as client:
        assert client.request(GetBatch(version=1), 10) == NotReady(waiting_for="x")
    end()


def test_refusals_and_hellos_reach_the_caller(workdir):
    greeted = []

    def answer(message):
        if isinstance(message, Hello):
            greeted.append(message)
            return []
        if isinstance(message, GetStatus):
            return [Status(data={"n": len(greeted)})] if len(greeted) > 1 else [Refused(reason=HELLO_FIRST)]
        return [Refused(reason="version 9 is not published")]

    end = serve_in_thread(workdir, answer)
    with SyncClient("trainer-0", workdir, hello=hello) as client:
        assert client.request(GetStatus(), 10) == Status(data={"n": 2})
        with pytest.raises(RequestRefused, match="controller refused GetBatch: version 9 is not published"):
            client.request(GetBatch(version=9), 10)
    end()


def test_client_follows_a_server_that_comes_back(workdir):
    async def body():
        server = Server(LOOPBACK, "controller", workdir)
        async with Client("a", workdir, hello=hello) as client:
            await server.receive()
            server.close()
            server = Server(LOOPBACK, "controller", workdir)
            received = asyncio.create_task(server.receive())
            while not received.done():  # what was sent while the connection broke is lost; heartbeats come again
                await client.send(Heartbeat(name="a", phase="idle"))
                await asyncio.wait([received], timeout=0.05)
            peer, message = await received
            assert isinstance(message, Heartbeat)
            await server.send(peer, Refused(reason=HELLO_FIRST))
            receiving = asyncio.create_task(client.receive())
            while (await server.receive())[1] != hello():
                pass
            await server.send(peer, WELCOME)
            assert await receiving == WELCOME
            server.close()

    run(body())


def test_waiting_for_a_server_is_bounded_and_names_it(tmp_path):
    async def body():
        with pytest.raises(EndpointMissing, match=r"waited 0\.1 s for rewards-0"):
            await Client("a", tmp_path, server="rewards-0", timeout=0.1).open()

    run(body())
    with pytest.raises(EndpointMissing, match="controller to announce its address"):
        SyncClient("a", tmp_path).request(GetStatus(), 0.05)


def test_a_peer_that_is_gone_or_does_not_read_delays_nobody(tmp_path):
    async def body():
        async with Server(LOOPBACK, "controller", tmp_path, high_water=4) as server:
            assert not await server.send(Peer(b"nobody/0"), WELCOME)
            async with Client("a", tmp_path, hello=hello, high_water=4) as _:
                peer, _ = await server.receive()
                big = Status(data={"x": "y" * 1_000_000})
                sent = [await server.send(peer, big) for _ in range(100)]
                assert sent[0] and not sent[-1]
                assert server.undelivered == sent.count(False) + 1

    run(body())


def raw_dealer(context, endpoint, identity=b"raw/0"):
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.LINGER, 0)
    sock.connect(endpoint)
    return sock


def good(sequence, message=None, session=7):
    return wire.frames(session, sequence, 0, message or hello(), wire.MAX_BYTES)


def test_what_is_not_ours_is_refused_and_counted(tmp_path):
    async def body():
        context = zmq.Context()
        async with Server(LOOPBACK, "controller", tmp_path, max_bytes=1000) as server:
            sock = raw_dealer(context, server.endpoint)
            header, payload = good(2)
            bad = [
                [b""],
                [payload],
                [header, payload, b"more"],
                [b"AJX0" + header[4:], payload],
                [header, payload[:-3]],
                [header, payload + b"\x00"],
                [header, b"\x81\xa4type\xa4evil"],
                [header, b"\x91" * 900 + b"\xc0"],
                [header, b"\x81\xa4type\xadupdate_weights"],
            ]
            for parts in bad:
                sock.send_multipart(parts)
            sock.send_multipart([header, b"x" * 1500])
            sock.send_multipart(good(2))
            sock.send_multipart(good(2))  # replayed
            sock.send_multipart(good(1))  # out of order
            sock.send_multipart(good(3, Goodbye(name="raw")))
            assert (await server.receive())[1] == hello()
            assert (await server.receive())[1] == Goodbye(name="raw")
            assert server.guard.refused == {"malformed": len(bad), "oversized": 1, "out_of_order": 2}
            assert server.guard.refused_by_peer() == {"raw/0": dict(server.guard.refused)}
            with pytest.raises(MessageTooLarge, match="SetState has"):
                await server.send(Peer(b"raw/0"), SetState(version=0, data=bytes(2000)))
        context.destroy(linger=0)

    run(body())


def test_a_far_too_large_message_costs_only_its_own_connection(tmp_path):
    async def body():
        context = zmq.Context()
        async with Server(LOOPBACK, "controller", tmp_path, max_bytes=10_000) as server:
            raw = raw_dealer(context, server.endpoint)
            raw.send_multipart([good(1)[0], bytes(1_000_000)])
            async with Client("a", tmp_path, hello=hello) as _:
                assert (await server.receive())[0].name == "a"
        context.destroy(linger=0)

    run(body())


async def _drain(server):
    return [message async for _, message in server]


def test_a_flood_does_not_starve_others(tmp_path):
    async def body():
        context = zmq.Context()
        async with Server(LOOPBACK, "controller", tmp_path, mute_after=50) as server:
            flood = raw_dealer(context, server.endpoint, b"flood/0")
            for i in range(900):
                flood.send_multipart(good(i, Heartbeat(name="flood", phase="x")))
            while (await server.receive())[0].name != "flood":
                pass
            async with Client("a", tmp_path, hello=hello) as client:
                while client.disconnected_for:
                    await asyncio.sleep(0)
                before = server.guard.accepted
                while (await server.receive())[0].name == "flood":
                    pass
                assert server.guard.accepted - before < 500, "peers are read in turn"
                # rubbish: after `mute_after` in a row the peer is no longer even decoded
                for _ in range(200):
                    flood.send_multipart([b"rubbish"])
                flood.send_multipart(good(10_000))
                await client.send(Goodbye(name="a"))
                while not isinstance((await server.receive())[1], Goodbye):
                    pass
                accepted = asyncio.create_task(_drain(server))
                while server.guard.refused.total() < 201:
                    await asyncio.sleep(0.001)
                server.close()
                assert all(isinstance(message, Heartbeat) for message in await accepted), "what it sent before"
                assert server.guard.refused == {"malformed": 50, "muted": 151}
        context.destroy(linger=0)

    run(body())


def test_closing_frees_descriptors_and_ends_loops(workdir):
    async def once():
        server = Server(LOOPBACK, "controller", workdir)
        client = Client("a", workdir, hello=hello)
        await client.open()
        await server.receive()

        async def read(socket):
            return [item async for item in socket]

        readers = [asyncio.create_task(read(server)), asyncio.create_task(read(client))]
        await asyncio.sleep(0)
        client.close()
        server.close()
        assert await asyncio.gather(*readers) == [[], []]

    async def body():
        await once()
        await asyncio.sleep(0)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await once()
        await asyncio.sleep(0)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    run(body())


def test_heartbeats_of_a_busy_role_come_from_a_thread(workdir):
    got, asked = [], []
    enough = threading.Event()

    def answer(message):
        got.append(message)
        if sum(isinstance(m, Heartbeat) for m in got) >= 3:
            enough.set()
        if isinstance(message, Heartbeat) and not asked:
            asked.append(message)
            return [Refused(reason=HELLO_FIRST)]
        return []

    end = serve_in_thread(workdir, answer)
    with HeartbeatThread("t", workdir, hello, lambda: Heartbeat(name="t", phase="training"), 0.01) as thread:
        assert enough.wait(10)
        thread.check()
    while not isinstance(got[-1], Goodbye):
        pass
    end()
    assert got.count(hello()) == 2
