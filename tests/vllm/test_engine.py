"""vLLM under `recompute`: what it generates while weights change, held against the trainer's model, span by span."""

import asyncio
import mmap

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from areal_jax import models
from areal_jax.rollout.engine import EngineDied, WeightsRefused
from areal_jax.weights import Publisher, cleanup
from tests.vllm.processes import vllm_processes

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.parametrize("harness", [("qwen3", {"weights": 1})], ids=["qwen3"], indirect=True),
]
TOLERANCE = 1e-3


def test_pushed_weights_score_as_the_trainer_and_equal_our_export(harness):
    harness.check_pushed_weights(1)


def test_under_recompute_every_token_is_of_its_version_on_the_whole_prefix(harness):
    before = harness.engine.version
    done, timings = harness.run(harness.update_in_flight(updates=5, prompt=10, new=140))
    assert len(np.unique(done[0][1].versions)) >= 2, "no update reached a request in flight; the test shows nothing"
    for request, completion in done[:30]:
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)
    assert harness.engine.version == before + 5 and harness.engine.stats()["tokens_recomputed"] > 0
    for timing in timings:
        assert timing.keys() >= {"read", "verify", "open", "pause", "load"} and 0 < timing["load"] < timing["pause"]


def test_sampling_settings_mean_what_they_say(harness):
    version = harness.engine.version
    greedy = harness.request(20, 30, temperature=0.0)
    first, second = (harness.run(harness.engine.generate(greedy)) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.logprobs, harness.rescore(greedy, first), atol=TOLERANCE)  # of temperature 1
    assert (first.versions == version).all()

    stop = int(first.tokens[7])
    at = int(np.flatnonzero(first.tokens == stop)[0])
    stopped = harness.run(harness.engine.generate(harness.request(20, 30, temperature=0.0, stop_token_ids=(stop,))))
    assert stopped.finish_reason == "stop"
    np.testing.assert_array_equal(stopped.tokens, first.tokens[: at + 1])  # the stop token included

    late = harness.request(20, 30, temperature=0.0, stop_token_ids=(stop,), min_new_tokens=at + 2)
    assert len(harness.run(harness.engine.generate(late)).tokens) >= at + 2

    whole = harness.run(harness.engine.generate(harness.request(20, 1000)))
    assert len(whole.tokens) == harness.max_length - 20 and whole.finish_reason == "length"

    top = harness.request(20, 50, seed=3, temperature=0.7, top_k=1)
    np.testing.assert_allclose(harness.run(harness.engine.generate(top)).logprobs, 0.0, atol=1e-5)
    nucleus = harness.request(20, 100, seed=4, temperature=1.0, top_p=0.5)
    completion = harness.run(harness.engine.generate(nucleus))
    # Of the distribution really sampled from: half the mass was cut off, so each is likelier than before, up to twice.
    gain = completion.logprobs - harness.rescore(nucleus, completion)
    assert (gain > -TOLERANCE).all() and (gain < np.log(2) + TOLERANCE).all() and gain.max() > 0.3
    with pytest.raises(ValueError, match="leaves no room"):
        harness.run(harness.engine.generate(harness.request(harness.max_length, 5)))


def test_a_flipped_byte_is_refused_and_the_old_version_stays(harness):
    version = harness.engine.version
    before = harness.run(harness.engine._llm.compute_weight_checksums())
    manifest = harness.publish(version + 1)
    with open(manifest.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[manifest.tensors[3].offset] ^= 1
    with pytest.raises(WeightsRefused, match=manifest.tensors[3].name):
        harness.run(harness.engine.update_weights(manifest))
    assert harness.engine.version == version
    assert harness.run(harness.engine._llm.compute_weight_checksums()) == before
    request = harness.request(15, 20)
    completion = harness.run(harness.engine.generate(request))
    assert (completion.versions == version).all()
    np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)
    harness.update(version + 1)  # the worker goes on with the next good one
    assert harness.engine.version == version + 1


def test_a_version_with_other_tensors_is_refused(harness):
    version = harness.engine.version
    manifest = harness.publish(version + 1)
    for tensors, complaint in [
        (manifest.tensors[:-1], "is missing"),
        ([msgspec.structs.replace(manifest.tensors[0], shape=(1,)), *manifest.tensors[1:]], "it was float32"),
    ]:
        with pytest.raises(WeightsRefused, match=complaint):
            harness.run(harness.engine.update_weights(msgspec.structs.replace(manifest, tensors=tensors)))
    assert harness.engine.version == version


def test_vllm_workers_check_what_the_rollout_worker_has_not(harness):
    """As on another host: the file is not the one whose checksums were compared, so each vLLM worker compares them."""
    manifest = harness.publish(harness.engine.version + 1)
    with open(manifest.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[manifest.tensors[2].offset + 1] ^= 4
    arguments = (msgspec.to_builtins(manifest), None, None, 10.0)
    refusals = harness.run(harness.engine._llm.collective_rpc("areal_jax_open_weights", args=arguments))
    assert len(refusals) == 1 and manifest.tensors[2].name in refusals[0]


@pytest.mark.parametrize("transport", ["tcp", "disk"])
def test_a_version_of_another_host_is_loaded(harness, transport, tmp_path, monkeypatch):
    """The other host is played by another name and a folder of its own for shared memory."""
    version = harness.engine.version + 1
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(harness.engine, "_workdir", str(tmp_path / "run"))  # where the keys would be
    with Publisher(tmp_path / "run", transport=transport, shared_memory=tmp_path / "memory") as publisher:
        named = models.to_hf(harness.model, harness.params(version), jnp.float32)
        manifest = msgspec.structs.replace(publisher.publish(version, named), host="elsewhere")
        harness.run(harness.engine.update_weights(manifest))
    assert cleanup(tmp_path / "run"), "there is a copy of this host's own"
    request = harness.request(15, 20)
    completion = harness.run(harness.engine.generate(request))
    assert (completion.versions == version).all()
    np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)


@pytest.mark.faults
def test_a_killed_engine_is_reported_to_all_who_wait(harness):
    """Requests that run, requests that wait for a slot, later requests, updates: all raise `EngineDied`."""

    async def kill():
        requests = [harness.request(5, 190, seed=i) for i in range(3 * harness.slots)]
        running = [asyncio.create_task(harness.engine.generate(r)) for r in requests]
        await asyncio.sleep(0.2)
        for process in vllm_processes():
            process.kill()
        return await asyncio.gather(*running, return_exceptions=True)

    results = harness.run(kill(), timeout=30)
    assert sum(isinstance(r, EngineDied) for r in results) >= 2 * harness.slots
    assert all(isinstance(r, EngineDied) for r in results if isinstance(r, BaseException)), results
    with pytest.raises(EngineDied):
        harness.run(harness.engine.generate(harness.request(5, 5)), timeout=30)
    with pytest.raises(EngineDied):
        harness.run(harness.engine.update_weights(harness.publish(harness.engine.version + 1)), timeout=30)
    with pytest.raises(EngineDied):
        harness.engine.stats()
    harness.run(harness.engine.close())
    assert not vllm_processes()
