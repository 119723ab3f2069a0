"""The embedded engine: what it samples depends on weights, request and key alone, and says truthfully which weights."""

import asyncio
import dataclasses

import numpy as np
import pytest
from engines import (
    MODEL,
    STOP,
    SteppedEngine,
    full_logits,
    generate,
    load,
    make_engine,
    manifest,
    params_of,
    requests,
    rescore,
)

from areal_jax.rollout.engine import EngineDied, Request, Sampling, WeightsRefused
from areal_jax.rollout.sampling import draw, request_keys, sampling_logprobs
from tests.models import tiny


def same(a, b, *, bitwise=True):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
        assert x.finish_reason == y.finish_reason
        if bitwise:
            np.testing.assert_array_equal(x.logprobs, y.logprobs)
        else:
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def reference():
    wanted = requests(12)
    done, stats = generate(make_engine(), wanted)
    return wanted, done, stats


def test_continuous_batching_equals_one_at_a_time_bit_for_bit(reference):
    wanted, done, _ = reference
    same(generate(make_engine(), wanted, together=False)[0], done)


def test_equal_prompts_are_run_once_and_change_nothing_bit_for_bit():
    """As the samples of a group: five equal prompts and another one, in prefills of two."""
    first, other = requests(2)
    wanted = [dataclasses.replace(first, key=(7, 0, i)) for i in range(5)] + [other]
    engine, prefilled = make_engine(slots=6), []
    run, admit = engine._programs.prefill, engine._admit
    engine._admit = lambda: len(engine._waiting) == 6 and admit()  # all of them at once
    engine._programs.prefill = lambda params, tokens, lengths: (
        prefilled.append(np.count_nonzero(lengths)) or run(params, tokens, lengths)
    )
    done, stats = generate(engine, wanted)
    assert sum(prefilled) == 2  # warm-up's are empty
    assert stats["tokens_prefilled"] == len(first.tokens) + len(other.tokens)
    same(generate(make_engine(slots=6), wanted, together=False)[0], done)
    assert len({completion.tokens.tobytes() for completion in done[:5]}) == 5


def test_order_and_dispatch_length_change_nothing_bit_for_bit(reference):
    wanted, done, _ = reference
    order = np.random.default_rng(0).permutation(len(wanted))
    shuffled, _ = generate(make_engine(steps_per_dispatch=1), [wanted[i] for i in order])
    same(shuffled, [done[i] for i in order])


@pytest.mark.slow
def test_slots_and_length_of_the_cache_change_no_token(reference):
    wanted, done, _ = reference
    same(generate(make_engine(slots=7, max_length=64), wanted)[0], done, bitwise=False)


def test_few_running_sequences_are_decoded_alone_and_change_no_token(reference):
    """Forty requests in 64 slots: all rows are decoded at first, half of them when enough have ended."""
    wanted = requests(40)
    engine = make_engine(slots=64)
    counts, decoded = engine._programs.counts, []
    programs, admit = engine._programs, engine._admit
    engine._admit = lambda: (len(engine._waiting) == 40 or engine._table.running) and admit()  # all of them at once
    for name, rows in (("_decode", 64), ("_decode_few", 32)):
        run = getattr(programs, name)
        setattr(programs, name, lambda *given, run=run, rows=rows: decoded.append(rows) or run(*given))
    done, stats = generate(engine, wanted)
    decoded = decoded[2 * len(programs.lengths) :]  # the others are warm-up's
    assert counts == (32, 64) and {*decoded} == {32, 64} and decoded == sorted(decoded, reverse=True)
    same(done[:12], reference[1], bitwise=False)
    for request, completion in zip(wanted, done):
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)
    assert stats["tokens_generated"] == sum(len(completion.tokens) for completion in done)
    assert make_engine(slots=64, exact=True)._programs.counts == (64,)


def test_longer_caches_change_nothing_bit_for_bit():
    """Completions that outgrow the first bucket, in company that does not, and the other way round."""
    long = requests(3, max_new_tokens=50, stop_token_ids=())
    settings = {"max_length": 64, "slots": 4}
    alone, stats = generate(make_engine(**settings), long[1:2])  # crosses a bucket's end in the middle of a dispatch
    together, _ = generate(make_engine(**settings), long + requests(5, seed=3))
    same(alone, together[1:2])
    assert len(alone[0].tokens) == 50 and stats["recompiles_after_warmup"] == 0
    for request, completion in zip(long, together):
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)


def test_log_probs_are_those_of_a_full_forward(reference):
    wanted, done, _ = reference
    for request, completion in zip(wanted, done):
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)


def test_log_probs_are_of_the_tempered_distribution():
    wanted = requests(4, temperature=1.7)
    done, _ = generate(make_engine(), wanted)
    for request, completion in zip(wanted, done):
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)


def test_log_probs_are_of_the_part_of_the_distribution_that_top_k_and_top_p_leave():
    restricted = {"temperature": 0.7, "top_k": 4, "top_p": 0.8}
    wanted = [*requests(4, **restricted), *requests(4, seed=9)]  # in the company of others
    done, _ = generate(make_engine(), wanted)
    for request, completion in zip(wanted[:4], done):
        logits, n = full_logits(request, completion)
        each = (np.full(len(logits), x, t) for x, t in zip(restricted.values(), (np.float32, np.int32, np.float32)))
        logprobs = np.asarray(tiny.jit(sampling_logprobs)(logits, *each))
        before = np.arange(len(request.tokens) - 1, n - 1)
        np.testing.assert_allclose(completion.logprobs, logprobs[before, completion.tokens], atol=1e-4)
        assert (np.isfinite(logprobs[before]).sum(axis=1) <= 4).all()


def test_each_token_is_the_one_that_its_key_and_absolute_position_draw(reference):
    """By a full forward and the pure functions, without cache, slots or schedule."""
    for request, completion in list(zip(*reference[:2]))[:4]:
        logits, n = full_logits(request, completion)
        positions, one = np.arange(len(logits), dtype=np.int32), np.ones(len(logits), np.float32)
        logprobs = tiny.jit(sampling_logprobs)(logits, one, np.zeros(len(logits), np.int32), one)
        keys = tiny.jit(request_keys)(np.tile(np.asarray(request.key, np.int32), (len(logits), 1)))
        drawn, _ = tiny.jit(draw)(logprobs, keys, positions + 1, one)
        np.testing.assert_array_equal(drawn[len(request.tokens) - 1 : n - 1], completion.tokens)


def test_stop_limit_and_counts(reference):
    wanted, done, stats = reference
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for request, completion in zip(wanted, done):
        assert not (completion.tokens[:-1] == STOP).any()
        assert (completion.tokens[-1] == STOP) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.tokens) == request.sampling.max_new_tokens
        assert set(completion.versions) == {0}
        assert completion.tokens.dtype == completion.versions.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
    assert stats["tokens_generated"] == sum(len(c.tokens) for c in done)
    assert stats["tokens_prefilled"] == sum(len(r.tokens) for r in wanted)
    assert stats["requests_finished"] == len(wanted)
    assert stats["running"] == stats["waiting"] == stats["recompiles_after_warmup"] == stats["weight_updates"] == 0


def test_min_new_tokens_forbids_to_stop_and_its_log_probs_say_so():
    plain, forced = requests(8, max_new_tokens=9), requests(8, max_new_tokens=9, min_new_tokens=6)
    done, _ = generate(make_engine(), plain + forced)
    assert any(len(c.tokens) < 6 for c in done[:8])
    for request, completion in zip(forced, done[8:]):
        assert len(completion.tokens) >= 6 and not (completion.tokens[:5] == STOP).any()
        unmasked = rescore(request, completion)
        assert (completion.logprobs[:6] > unmasked[:6]).all()  # renormalised without the stop token
        np.testing.assert_allclose(completion.logprobs[6:], unmasked[6:], atol=1e-4)


def test_greedy_and_single_tokens_and_the_end_of_the_context():
    [request] = requests(1)
    greedy = Request(tokens=request.tokens, sampling=Sampling(max_new_tokens=8, temperature=0.0), key=(0, 0, 0))
    other = Request(tokens=request.tokens, sampling=greedy.sampling, key=(1, 9, 9))
    single = Request(tokens=request.tokens, sampling=Sampling(max_new_tokens=1), key=(0, 0, 0))
    edge = Request(tokens=np.ones(30, np.int32), sampling=Sampling(max_new_tokens=99), key=(0, 0, 0))
    done, _ = generate(make_engine(), [greedy, other, single, edge])
    same(done[:1], done[1:2])
    np.testing.assert_allclose(done[0].logprobs, rescore(greedy, done[0]), atol=1e-4)
    assert len(done[2].tokens) == 1 and len(done[3].tokens) == 2
    assert all(c.finish_reason == "length" for c in done)


# --- New weights in flight -----------------------------------------------------------------------------------------


def test_each_token_was_sampled_by_the_version_that_it_carries():
    wanted = requests(9, max_new_tokens=24, stop_token_ids=())
    engine = make_engine(SteppedEngine, updates={2: 1, 4: 2, 9: 5})
    done, stats = generate(engine, wanted)
    assert stats["weight_updates"] == 3 and stats["recompiles_after_warmup"] == 0
    assert {v for c in done for v in c.versions.tolist()} == {0, 1, 2, 5}
    assert any(len(set(c.versions.tolist())) >= 3 for c in done)
    for request, completion in zip(wanted, done):
        assert (np.diff(completion.versions) >= 0).all()
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)
        if len(set(completion.versions.tolist())) > 1:  # the check can fail: one version too new, on every token
            wrong = rescore(request, completion, np.full_like(completion.versions, completion.versions[-1]))
            assert np.abs(wrong - completion.logprobs).max() > 0.1


def test_kept_caches_are_those_of_the_old_weights():
    wanted = requests(4, max_new_tokens=24, stop_token_ids=())
    done, stats = generate(make_engine(SteppedEngine, updates={2: 1}, kv_policy="keep"), wanted)
    assert stats["tokens_recomputed"] == 0
    for request, completion in zip(wanted, done):
        off = np.abs(completion.logprobs - rescore(request, completion))
        old = completion.versions == 0
        assert old.any() and off[old].max() < 1e-4 and off[~old].max() > 1e-2


def test_without_interruption_every_sequence_has_one_version():
    wanted = [requests(8, max_new_tokens=8 + i, stop_token_ids=())[i] for i in range(8)]
    done, stats = generate(make_engine(SteppedEngine, updates={2: 1, 6: 2}, interruptible=False), wanted)
    assert stats["sequences_interrupted"] == stats["tokens_recomputed"] == 0
    versions = [set(c.versions.tolist()) for c in done]
    assert versions[:4] == [{0}] * 4 and versions[4:] == [{1}] * 4  # version 1 waited, and so did those behind it
    for request, completion in zip(wanted, done):
        np.testing.assert_allclose(completion.logprobs, rescore(request, completion), atol=1e-4)


def test_update_reports_where_its_time_went_and_that_generation_stood_still():
    engine = make_engine(SteppedEngine, updates={2: 1})
    seen = []
    engine.on_change = lambda: seen.append(engine.paused)
    _, stats = generate(engine, requests(2, stop_token_ids=()))
    timings = engine.tasks[0].result()
    assert set(timings) == {"read", "pause", "recompute"} and timings["pause"] >= timings["recompute"] > 0
    assert seen == [True, False] and stats["sequences_interrupted"] == 2 and stats["tokens_recomputed"] > 0


# --- What goes wrong -----------------------------------------------------------------------------------------------


def run(engine, body):
    async def main():
        await engine.start(manifest(0))
        try:
            await body()
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_request_that_cannot_fit_is_an_error_for_itself_alone():
    engine = make_engine()
    good = requests(1)[0]

    async def body():
        for tokens, sampling, text in [
            (np.ones(32, np.int32), {}, "max_length=32"),
            (np.ones(0, np.int32), {}, "at least one token"),
            (good.tokens, {"max_new_tokens": 0}, "max_new_tokens"),
            (good.tokens, {"top_p": 0.0}, "top_p"),
            (good.tokens, {"stop_token_ids": tuple(range(40))}, "stop tokens"),
        ]:
            bad = Request(tokens=tokens, sampling=Sampling(**({"max_new_tokens": 4} | sampling)), key=(0, 0, 0))
            with pytest.raises(ValueError, match=text):
                await engine.generate(bad)
        assert len((await engine.generate(good)).tokens)

    run(engine, body)


def test_a_refused_version_leaves_the_old_one_at_work():
    def broken(manifest):
        if manifest.version == 1:
            raise WeightsRefused("version 1: checksum of lm_head.weight")
        return load(manifest)

    engine = make_engine(load=broken)

    async def body():
        with pytest.raises(WeightsRefused, match="checksum"):
            await engine.update_weights(manifest(1))
        assert engine.version == 0
        assert set((await engine.generate(requests(1)[0])).versions) == {0}
        await engine.update_weights(manifest(2))
        assert set((await engine.generate(requests(1)[0])).versions) == {2}

    run(engine, body)


def test_an_older_version_is_refused_while_sequences_run():
    engine = make_engine(SteppedEngine, updates={2: 1, 3: 0})

    async def body():
        completion = await engine.generate(requests(1, stop_token_ids=())[0])
        assert completion.versions[-1] == 1
        with pytest.raises(WeightsRefused, match="older"):
            await engine.tasks[1]
        await engine.update_weights(manifest(0))  # idle now: the trainer has gone back to a checkpoint
        assert engine.version == 0

    run(engine, body)


def test_weights_that_give_no_numbers_fail_the_request():
    import jax

    def diverged(manifest):
        return jax.tree.map(lambda x: x * np.float32("nan"), params_of(0)), {}

    async def body():
        with pytest.raises(FloatingPointError, match="version 0"):
            await engine.generate(requests(1)[0])

    engine = make_engine(load=diverged)
    run(engine, body)


def test_a_cancelled_request_frees_its_slot():
    engine = make_engine(slots=1)

    async def body():
        first = asyncio.create_task(engine.generate(requests(1, max_new_tokens=31, stop_token_ids=())[0]))
        second = asyncio.create_task(engine.generate(requests(2)[1]))
        third = asyncio.create_task(engine.generate(requests(3)[2]))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        assert len((await third).tokens)
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0

    run(engine, body)


def test_when_the_engine_dies_everyone_hears_why():
    def useless(manifest):
        return (params_of(0) if manifest.version == 0 else {"nothing": np.zeros(1, np.float32)}), {}

    engine = make_engine(SteppedEngine, load=useless, updates={1: 1}, kv_policy="keep")

    async def body():
        results = await asyncio.gather(*(engine.generate(r) for r in requests(6)), return_exceptions=True)
        assert all(isinstance(result, EngineDied) for result in results[:4])
        with pytest.raises(EngineDied, match="engine died"):
            await engine.generate(requests(1)[0])
        with pytest.raises(EngineDied, match="engine died"):
            await engine.update_weights(manifest(2))

    run(engine, body)


def test_closing_ends_what_is_in_flight_and_before_the_start_nothing_runs():
    engine = make_engine()

    async def main():
        with pytest.raises(EngineDied, match="start"):
            await engine.generate(requests(1)[0])
        await engine.start(manifest(0))
        tasks = [asyncio.create_task(engine.generate(r)) for r in requests(9, max_new_tokens=31, stop_token_ids=())]
        await asyncio.sleep(0)
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[-1], EngineDied)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_settings_that_make_no_sense():
    for settings in ({"slots": 0}, {"kv_policy": "hope"}, {"max_length": 1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            make_engine(model=MODEL, **settings)
