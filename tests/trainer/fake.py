"""A controller for tests of the loop: real sockets, invented batches; not a test itself."""

import asyncio
import threading

import numpy as np

from areal_jax import models
from areal_jax.config import resolve, save
from areal_jax.transport import messages as m
from areal_jax.transport.sockets import Server
from areal_jax.weights import open_version
from tests.models import tiny
from tests.trainer import toy


class FakeController:
    """Answers as the controller does; `batches(version)` gives the groups of a step (none: the data is used up)."""

    def __init__(self, workdir, batches=None):
        self.workdir = workdir
        self.batches = batches or (
            lambda v: toy.make_groups(np.random.default_rng(v), version=v, lags=range(min(v, 2) + 1))
        )
        self.log, self.versions, self.beats, self.state = [], {}, [], None
        self.on_batch = lambda version: None
        self.ready = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.close)
        self._thread.join(10)

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        async with Server("tcp://127.0.0.1:*", "controller", self.workdir) as self._server:
            self.ready.set()
            async for peer, message in self._server:
                reply = self._answer(message)
                if reply is not None:
                    await self._server.send(peer, reply)

    def _answer(self, message):
        if isinstance(message, m.Heartbeat):
            self.beats.append(message)
            return None
        if isinstance(message, (m.Hello, m.Goodbye)):
            return None
        self.log.append(message)
        if isinstance(message, m.Publish):
            with open_version(message.manifest) as opened:
                self.versions[message.manifest.version] = {name: np.array(x, np.float32) for name, x in opened}
            return m.Published(version=message.manifest.version)
        if isinstance(message, m.GetBatch):
            self.on_batch(message.version)
            if self.log.count(message) == 1:
                return m.NotReady(waiting_for="rollout-0, 3 samples running")
            return m.Batch(version=message.version, groups=self.batches(message.version), report={"queue/depth": 4.0})
        if isinstance(message, m.Evaluate):
            return m.EvaluationResult(version=message.version, accuracy=0.1 * message.version, samples=10, failed=0)
        if isinstance(message, m.GetState):
            return m.State(version=message.version, data=b"state of %d" % message.version)
        if isinstance(message, m.SetState):
            self.state = message
            return m.Published(version=message.version)
        if isinstance(message, m.Finish):
            return m.Status(data={"trained_samples": 48, "staleness_bound": 2, "max_staleness": 1, "dropped_stale": 0})
        return m.Refused(reason=f"a {type(message).__name__} is not expected here")

    def kinds(self):
        """The requests in their order, each kind once in a row."""
        names = [type(message).__name__ for message in self.log]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def prepare(folder, width=16, controller={}, **trainer):  # noqa: B006
    """A run's folder with a toy checkpoint and a config; returns (workdir, resolved config)."""
    model = toy.make_model(width=width, layers=1, heads=2)
    models.export_hf(model, tiny.random_params(model), folder / "model", dtype="float32")
    config = resolve(
        {
            "name": "test",
            "model": str(folder / "model"),
            "data": {"eval": "arithmetic:count=4"},
            "rollout": {"max_length": 64, "max_new_tokens": 48},
            "controller": {"batch_size": 4, "group_size": 4, "max_staleness": 2, "heartbeat_seconds": 0.2} | controller,
            "metrics": {"tensorboard": False},
            "trainer": {
                "steps": 3, "rows": 4, "row_length": 64, "proximal": "fused", "learning_rate": 1e-3, "fsdp": 1,
                "batch_timeout": 60.0, **trainer,
            },
        }
    )  # fmt: skip
    workdir = folder / "run"
    save(config, workdir)
    return workdir, config
