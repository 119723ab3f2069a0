"""Small engines for the tests: a random two-layer network, versions that differ, and updates at a chosen dispatch."""

import asyncio
import functools
import threading

import jax
import numpy as np

from areal_jax.models import Model, ModelConfig
from areal_jax.rollout.engine import Request, Sampling
from areal_jax.rollout.jax_engine import JaxEngine
from areal_jax.transport.messages import Manifest
from tests.models import tiny

VOCABULARY, STOP = 17, 0
MODEL = Model(
    ModelConfig(
        family="qwen2", vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_size=48, qkv_bias=True, init_std=0.3,
    )
)  # fmt: skip


@functools.cache
def params_of(version: int):
    return tiny.random_params(MODEL, 100 + version)


def manifest(version: int) -> Manifest:
    return Manifest(version=version, nbytes=0, tensors=[], path="", host="")


def load(manifest: Manifest):
    return params_of(manifest.version), {"read": 0.0}


class SteppedEngine(JaxEngine):
    """Before decode dispatch number n, waits until the weights `updates[n]` have reached the inbox."""

    def __init__(self, *args, updates: dict[int, int] | None = None, **settings):
        super().__init__(*args, **settings)
        self.updates, self.dispatches, self.tasks = updates or {}, 0, []
        self.posted = threading.Event()

    async def start(self, manifest):
        self.loop = asyncio.get_running_loop()
        await super().start(manifest)

    def _post(self, future, command):
        super()._post(future, command)
        self.posted.set()

    def _advance(self):
        super()._advance()
        self.dispatches += 1
        if self.dispatches in self.updates:
            self.posted.clear()
            version = self.updates[self.dispatches]
            self.loop.call_soon_threadsafe(
                lambda: self.tasks.append(self.loop.create_task(self.update_weights(manifest(version))))
            )
            assert self.posted.wait(60)


def make_engine(cls=JaxEngine, *, load=load, model=MODEL, **settings) -> JaxEngine:
    return cls(model, load, **({"slots": 4, "max_length": 32, "steps_per_dispatch": 3, "prefill_rows": 2} | settings))


def requests(count: int, *, seed=7, **sampling) -> list[Request]:
    """Prompts of different lengths; most completions end at a stop token, some at their limit."""
    rng = np.random.default_rng(seed)
    settings = {"max_new_tokens": 20, "stop_token_ids": (STOP,)} | sampling
    return [
        Request(
            tokens=rng.integers(1, VOCABULARY, rng.integers(1, 9)).astype(np.int32),
            sampling=Sampling(**settings),
            key=(seed, i // 2, i % 2),
        )
        for i in range(count)
    ]


def generate(engine: JaxEngine, wanted: list[Request], *, together=True, version=0):
    """Start, generate everything, wait for the updates, close; completions in the order of `wanted`, and the stats."""

    async def run():
        await engine.start(manifest(version))
        try:
            if together:
                done = await asyncio.gather(*(engine.generate(request) for request in wanted))
            else:
                done = [await engine.generate(request) for request in wanted]
            await asyncio.gather(*getattr(engine, "tasks", []))
            return done, engine.stats()
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


@functools.cache
def _full(method: str):
    return tiny.jit(getattr(MODEL, method))


def _padded(request: Request, completion):
    """(tokens, positions, segment ids) as one row of 64, and the length."""
    tokens, whole = np.zeros((1, 64), np.int32), np.concatenate([request.tokens, completion.tokens])
    tokens[0, : len(whole)] = whole
    index = np.arange(64, dtype=np.int32)[None]
    return (tokens, index, (index < len(whole)).astype(np.int32)), len(whole)


def full_logits(request: Request, completion) -> tuple[jax.Array, int]:
    """Next-token logits `[64, V]` under version 0 by a full forward, and how many of them mean something."""
    row, n = _padded(request, completion)
    return _full("logits")(params_of(0), *row)[0], n


def rescore(request: Request, completion, versions=None) -> np.ndarray:
    """Log-probs of the new tokens by a full forward under each token's own version, at the request's temperature."""
    row, n = _padded(request, completion)
    versions = completion.versions if versions is None else versions
    result = np.zeros(n, np.float32)
    for version in set(versions.tolist()):
        temperature = np.float32(request.sampling.temperature or 1.0)
        scored, _ = _full("token_logprobs")(params_of(version), *row, temperature)
        mine = len(request.tokens) + np.flatnonzero(versions == version)
        result[mine] = np.asarray(scored)[0, mine]
    return result[len(request.tokens) :]
