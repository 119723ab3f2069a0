"""How a controller ends: it stays for a trainer that has to save, and takes its journal along."""

import asyncio

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core
from areal_jax.controller.journal import Journal
from areal_jax.controller.service import Service
from areal_jax.transport import messages as m
from areal_jax.transport.sockets import Server

from .simulation import manifest

CONFIG = ControllerConfig(batch_size=2, group_size=2, heartbeat_seconds=0.1)


class Life:
    """A controller with a clock that a test moves."""

    def __init__(self, workdir):
        self.away = 0.0
        self.core = Core(CONFIG, [{"prompt": "1"}], now=self.now())
        self.journal = Journal(workdir)
        self.server = Server("tcp://127.0.0.1:*", "controller", workdir)
        self.service = Service(self.core, self.server, "test", self.now, self.journal)
        self.ticked = asyncio.Event()
        tick = self.core.tick
        self.core.tick = lambda now: (tick(now), self.ticked.set())
        self.serving = asyncio.create_task(self.service.run())

    def now(self):
        return asyncio.get_running_loop().time() + self.away

    async def tick(self, times=3):
        for _ in range(times):
            self.ticked.clear()
            await self.ticked.wait()


def trainer_beats(life):
    life.core.heartbeat(m.Heartbeat(name="trainer-0", phase="training"), life.now())


def test_it_stays_while_a_trainer_saves_and_no_longer(tmp_path):
    async def body():
        life = Life(tmp_path)
        life.core.hello(m.Hello(role="trainer", name="trainer-0", host="h", pid=1), life.now())
        await life.tick()
        life.service.end("told to")
        life.away += 2.0  # more than it takes without a trainer
        trainer_beats(life)
        await life.tick()
        assert not life.serving.done()
        life.core.goodbye("trainer-0", life.now())
        await life.serving
        life.server.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_trainer_that_is_dead_holds_it_up_for_seconds_only(tmp_path):
    async def body():
        life = Life(tmp_path)
        life.core.hello(m.Hello(role="trainer", name="trainer-0", host="h", pid=1), life.now())
        await life.tick()
        life.service.end("told to")
        life.away += 5.0
        await life.serving
        life.server.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_killed_after_the_last_report_it_is_followed_by_one_that_can_give_it_again(tmp_path):
    async def body():
        life = Life(tmp_path)
        life.core.publish(manifest(0), life.now())
        life.core.counters["trained_groups"] = 7
        life.service._handle(None, m.Finish())
        life.serving.cancel()
        await asyncio.wait([life.serving])
        life.server.close()
        again = Life(tmp_path)
        assert again.journal.recover(again.core, again.now())
        assert again.service._handle(None, m.Finish()).data["trained_groups"] == 7
        again.away += 10.0
        await again.serving
        again.server.close()
        assert not (tmp_path / "controller").exists()

    asyncio.run(asyncio.wait_for(body(), 30))
