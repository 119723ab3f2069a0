"""Ends and new beginnings, seen from the controller: no report is lost, no dead bytes are handed out."""

import asyncio

from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Send
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
        self.service = Service(self.core, self.server, self.now, self.journal)
        self.serving = asyncio.create_task(self.service.run())

    def now(self):
        return asyncio.get_running_loop().time() + self.away


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


def test_a_version_published_again_is_evaluated_from_its_new_bytes():
    """The trainer died while its first version was evaluated, and with it the bytes that it had published."""
    core = Core(CONFIG, [{"prompt": "1"}], [{"prompt": "e"}], now=0.0)
    core.publish(manifest(0, "gone", 1.0), 0.0)
    core.evaluate(0, 0.0)
    core.hello(m.Hello(role="rollout", name="a", host="h", pid=1, slots=4), 0.0)
    core.publish(manifest(0, "new", 2.0), 1.0)
    core.weights_loaded(m.WeightsLoaded("a", 0, 1.0, error="it is gone"), 1.0)
    core.tick(10.0)
    messages = [action.message for action in core.take_actions() if isinstance(action, Send)]
    told = [message.manifest.path for message in messages if isinstance(message, m.UpdateWeights)]
    assert told == ["gone", "new"]
