"""What vLLM generates while weights change under it, held against the trainer's model, version by version."""

import asyncio
import mmap

import msgspec
import numpy as np
import pytest

from areal_jax.rollout.engine import WeightsRefused

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TOLERANCE = 1e-3

recompute = pytest.mark.parametrize("harness", [("qwen3", {})], indirect=True)
keep = pytest.mark.parametrize("harness", [("qwen2", {"kv_policy": "keep"})], indirect=True)


async def update_in_flight(harness, requests, versions):
    """Run the requests together, and update whenever another tenth of them could have gone by."""
    running = [asyncio.create_task(harness.engine.generate(request)) for request in requests]
    timings = []
    for version in versions:
        await asyncio.sleep(0.15)
        timings.append(await harness.engine.update_weights(harness.publish(version)))
    return await asyncio.gather(*running), timings


@recompute
def test_under_recompute_every_token_is_of_its_version_on_the_whole_prefix(harness):
    requests = [harness.request(10 + 3 * i, 140, seed=i, temperature=0.9) for i in range(12)]  # more than the slots
    completions, timings = harness.run(update_in_flight(harness, requests, range(1, 6)))
    spans = set()
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == 140 and completion.finish_reason == "length"
        assert (np.diff(completion.versions) >= 0).all()
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)
        spans.add(len(np.unique(completion.versions)))
    assert max(spans) >= 3, "updates did not reach requests in flight; the test shows nothing"
    assert harness.engine.version == 5 and harness.engine.stats()["tokens_recomputed"] > 0
    for timing in timings:
        assert timing.keys() >= {"read", "verify", "open", "pause", "load"} and 0 < timing["load"] < timing["pause"]


@recompute
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


@recompute
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


@recompute
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


@recompute
def test_vllm_workers_check_what_the_rollout_worker_has_not(harness):
    """As on another host: the file is not the one whose checksums were compared, so each vLLM worker compares them."""
    manifest = harness.publish(harness.engine.version + 1)
    with open(manifest.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[manifest.tensors[2].offset + 1] ^= 4
    arguments = (msgspec.to_builtins(manifest), None, None, 10.0)
    refusals = harness.run(harness.engine._llm.collective_rpc("areal_jax_open_weights", args=arguments))
    assert len(refusals) == 1 and manifest.tensors[2].name in refusals[0]


async def fresh_request_after_update(harness, version, first, second):
    before = await harness.engine.generate(first)
    await harness.engine.update_weights(harness.publish(version))
    return before, await harness.engine.generate(second)


def same_prefix(harness):
    """Two requests that share a prompt of several cache blocks."""
    prompt = 150  # vLLM caches whole blocks of up to 128 tokens
    return harness.request(prompt, 20, seed=9), harness.request(prompt, 20, seed=9)


@keep
def test_under_keep_spans_are_right_and_later_requests_see_only_new_weights(harness):
    requests = [harness.request(12, 150, seed=i) for i in range(8)]
    completions, _ = harness.run(update_in_flight(harness, requests, range(1, 5)))
    assert max(len(np.unique(c.versions)) for c in completions) >= 2
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == 150 and (np.diff(completion.versions) >= 0).all()
        first = completion.versions == completion.versions[0]  # before any update nothing is stale
        np.testing.assert_allclose(
            completion.logprobs[first], harness.rescore(request, completion)[first], atol=TOLERANCE
        )
    first, second = same_prefix(harness)
    before, after = harness.run(fresh_request_after_update(harness, 5, first, second))
    assert (before.versions == 4).all() and (after.versions == 5).all()
    np.testing.assert_allclose(before.logprobs, harness.rescore(first, before), atol=TOLERANCE)
    np.testing.assert_allclose(after.logprobs, harness.rescore(second, after), atol=TOLERANCE)


@keep
def test_the_check_fails_when_the_prefix_cache_is_not_keyed_by_version(harness, monkeypatch):
    """The negative: without the key, a later request reads the older version's cache, and re-scoring shows it."""
    monkeypatch.setattr(harness.engine, "_salt", lambda: "the same for all")
    first, second = same_prefix(harness)
    _, after = harness.run(fresh_request_after_update(harness, 6, first, second))
    assert (after.versions == 6).all()
    assert np.abs(after.logprobs - harness.rescore(second, after)).max() > 10 * TOLERANCE


@keep
def test_without_interruption_every_sequence_has_one_version(harness, monkeypatch):
    monkeypatch.setattr(harness.engine, "_interruptible", False)
    requests = [harness.request(12, 60, seed=i) for i in range(20)]
    completions, timings = harness.run(update_in_flight(harness, requests, range(7, 9)))
    assert all(len(np.unique(c.versions)) == 1 for c in completions)
    assert all(t["drain"] > 0 for t in timings)
    for request, completion in zip(requests, completions, strict=True):
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)


@keep
def test_a_cancelled_request_gives_its_slot_back(harness):
    async def cancel_many():
        running = [asyncio.create_task(harness.engine.generate(harness.request(5, 190))) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return await harness.engine.generate(harness.request(5, 3))

    assert len(harness.run(cancel_many()).tokens) == 3
    stats = harness.engine.stats()
    assert stats["running"] == stats["waiting"] == 0
