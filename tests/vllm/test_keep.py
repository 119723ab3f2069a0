"""vLLM under `keep`: sequences in flight keep their caches; a later request never sees an older version's."""

import asyncio

import numpy as np
import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.parametrize("harness", [("qwen2", {"weights": 1, "kv_policy": "keep"})], ids=["qwen2"], indirect=True),
]
TOLERANCE = 1e-3


def test_pushed_weights_with_a_tied_head_score_as_the_trainer_and_equal_our_export(harness):
    harness.check_pushed_weights(1)


async def fresh_request_after_update(harness, first, second):
    before = await harness.engine.generate(first)
    await harness.engine.update_weights(harness.publish(harness.engine.version + 1))
    return before, await harness.engine.generate(second)


def same_prefix(harness):
    """Two requests that share a prompt of several cache blocks."""
    prompt = 150  # vLLM caches whole blocks of up to 128 tokens
    return harness.request(prompt, 20, seed=9), harness.request(prompt, 20, seed=9)


def test_under_keep_spans_are_right_and_later_requests_see_only_new_weights(harness):
    done, _ = harness.run(harness.update_in_flight(updates=4, prompt=10, new=140))
    assert len(np.unique(done[0][1].versions)) >= 2
    for request, completion in done[:30]:
        first = completion.versions == completion.versions[0]  # before any update nothing is stale
        np.testing.assert_allclose(
            completion.logprobs[first], harness.rescore(request, completion)[first], atol=TOLERANCE
        )
    version = harness.engine.version
    first, second = same_prefix(harness)
    before, after = harness.run(fresh_request_after_update(harness, first, second))
    assert (before.versions == version).all() and (after.versions == version + 1).all()
    np.testing.assert_allclose(before.logprobs, harness.rescore(first, before), atol=TOLERANCE)
    np.testing.assert_allclose(after.logprobs, harness.rescore(second, after), atol=TOLERANCE)


def test_the_check_fails_when_the_prefix_cache_is_not_keyed_by_version(harness, monkeypatch):
    """The negative: without the key, a later request reads the older version's cache, and re-scoring shows it."""
    monkeypatch.setattr(harness.engine, "_salt", lambda: "the same for all")
    first, second = same_prefix(harness)
    _, after = harness.run(fresh_request_after_update(harness, first, second))
    assert (after.versions == harness.engine.version).all()
    assert np.abs(after.logprobs - harness.rescore(second, after)).max() > 10 * TOLERANCE


def test_without_interruption_every_sequence_has_one_version(harness, monkeypatch):
    monkeypatch.setattr(harness.engine, "_interruptible", False)
    done, timings = harness.run(harness.update_in_flight(updates=2, prompt=12, new=60))
    assert all(t["drain"] > 0 for t in timings)
    assert len(np.unique(done[0][1].versions)) == 1
    for request, completion in done[:30]:
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=TOLERANCE)


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
