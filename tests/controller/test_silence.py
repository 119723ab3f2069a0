"""Who hangs is found by its silence, and reported so that it can be replaced; who is only late is not."""

import asyncio
import errno

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Silent
from areal_jax.controller.service import Service
from areal_jax.transport import messages as m
from areal_jax.transport.silence import Silence, report_silence, take_silence
from areal_jax.transport.sockets import Peer, Server

from .simulation import World

CONFIG = ControllerConfig(batch_size=2, group_size=2, max_staleness=1, heartbeat_limit=10.0)


def test_a_worker_that_hangs_loses_its_samples_at_once_and_is_reported_after_twice_the_limit():
    world = World(CONFIG, 10)
    hung = world.join("a")
    world.publish(0)
    world.load(hung)
    assert hung.work
    del world.workers["a"]
    world.advance(11.0)
    assert set(hung.work) <= world.core.ledger.queued and not world.silent
    world.advance(8.0)
    assert not world.silent
    world.advance(2.0)
    (silent,) = world.silent
    assert (silent.name, silent.host, silent.pid, silent.phase) == ("a", "h", 1, "starting")
    assert silent.seconds == 21.0
    world.advance(30.0)
    assert len(world.silent) == 1, "once is enough"


def test_a_worker_that_hangs_and_whose_connection_is_given_up_before_is_reported_as_well():
    """ZeroMQ may find out first that it does not answer, and then nobody waits for its heartbeat any more."""
    world = World(CONFIG, 10)
    world.join("a")
    world.publish(0)
    world.cut("a", seconds=8.0)
    world.advance(11.0)
    assert not world.silent
    world.advance(2.0)
    (silent,) = world.silent
    assert (silent.name, silent.host, silent.pid, silent.seconds) == ("a", "h", 1, 21.0)
    world.advance(30.0)
    assert len(world.silent) == 1, "once is enough"


def test_who_cannot_be_reached_and_comes_back_or_says_goodbye_is_not_reported():
    world = World(CONFIG, 10)
    world.join("a")
    world.join("b")
    world.rejoin(world.cut("a"))
    world.cut("b")
    world.core.goodbye("b", world.now)
    for _ in range(10):
        world.advance(5.0)
    assert not world.silent


def test_a_worker_that_comes_back_in_time_is_not_reported():
    world = World(CONFIG, 10)
    world.join("a")
    late = world.workers.pop("a")
    world.advance(15.0)
    world.core.hello(late.hello(), world.now)
    world.workers["a"] = late
    for _ in range(10):
        world.advance(5.0)
    assert not world.silent


def test_a_trainer_that_is_silent_is_not_to_be_killed():
    world = World(CONFIG, 10)
    world.core.hello(m.Hello(role="trainer", name="trainer-0", host="h", pid=1), world.now)
    world.advance(100.0)
    assert not world.silent


def test_a_controller_that_stood_still_itself_blames_nobody(tmp_path):
    async def body():
        loop = asyncio.get_running_loop()
        away = 0.0

        def clock():
            return loop.time() + away

        core = Core(CONFIG, [{"prompt": "1"}], now=clock())
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, clock)
            core.hello(m.Hello(role="rollout", name="a", host="h", pid=1, slots=4), clock())
            ticked, tick = asyncio.Event(), core.tick
            core.tick = lambda now: (tick(now), ticked.set())
            serving = asyncio.create_task(service.run())
            await ticked.wait()
            ticked.clear()
            away = 1000.0  # as after SIGSTOP and SIGCONT
            await ticked.wait()
            assert any("stood still" in note for _, note in core.telemetry.notes)
            assert core.knows("a") and not core.counters["workers_died"] and core.stopped is None
            service.end("enough")
            core.goodbye("a", clock())
            await serving

    asyncio.run(asyncio.wait_for(body(), 30))


def test_who_came_back_before_its_silence_could_be_written_down_is_not_reported(tmp_path):
    async def body():
        now, room, told = 0.0, False, []

        def report(silent):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device", "silent/.a")
            told.append(silent.name)

        core = Core(CONFIG, [{"prompt": "1"}])
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, lambda: now, on_silence=report)
            core.outbox += [Silent(name, "h", 1, 21.0, "generating") for name in ("a", "b")]
            await service._act()
            assert not told and service._handle(Peer(b"x"), m.GetStatus()).data["disk"] == ""  # no reason to end
            room, now = True, 1.0
            core.hello(m.Hello(role="rollout", name="a", host="h", pid=1, slots=4), now)
            await service._act()
            assert told == ["b"]

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_report_is_taken_once(tmp_path):
    silence = Silence("h", 7, 61.0, "generating")
    report_silence(tmp_path, "rollout-0", silence)
    assert (tmp_path / "silent").stat().st_mode & 0o777 == 0o700
    assert take_silence(tmp_path, "rollout-1") is None
    assert take_silence(tmp_path, "rollout-0") == silence
    assert take_silence(tmp_path, "rollout-0") is None
