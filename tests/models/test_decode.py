"""Prefill and decode give the logits of the full forward, slot by slot, whatever the other slots hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from tests.models import tiny

SLOTS, LENGTH, BUCKET = 5, 96, 64


def _functions(model):
    return jax.jit(model.prefill, donate_argnums=1), jax.jit(model.decode, donate_argnums=1)


FAST = ("mistral",)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in tiny.CONFIGS if n not in FAST)]
)
def test_prefill_and_decode_equal_the_full_forward(name):
    model, params = tiny.model_and_params(name)
    tokens, positions, segment_ids = tiny.one_sequence(2, LENGTH, seed=3)
    expected = np.asarray(tiny.jit(model.logits)(params, tokens, positions, segment_ids))
    prefill, decode = _functions(model)
    slots, lengths = np.array([3, 1], np.int32), np.array([60, 41], np.int32)
    cache = model.init_cache(SLOTS, LENGTH)
    logits, cache = prefill(params, cache, tokens[:, :BUCKET], lengths, slots)
    got = [logits]
    for step in range(36):  # crosses the sliding windows, which are 40 and 50 tokens
        fed, where = np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32)
        fed[slots], where[slots] = tokens[[0, 1], lengths + step], lengths + step
        logits, cache = decode(params, cache, fed, where)
        got.append(logits[slots])
    for row in range(2):
        want = expected[row, lengths[row] - 1 : lengths[row] + 36]
        np.testing.assert_allclose(np.stack(got)[:, row], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["qwen2-tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "qwen3-moe"))]
)
def test_a_slot_does_not_depend_on_the_others_bit_for_bit(name):
    model, params = tiny.model_and_params(name)
    prefill, decode = _functions(model)

    def run(seed):
        """Slot 2 always does the same; what the others hold, do and receive depends on the seed."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 131, (3, BUCKET), dtype=np.int32)
        mine = np.random.default_rng(99).integers(0, 131, BUCKET + 8, dtype=np.int32)
        tokens[1] = mine[:BUCKET]
        lengths = np.array([rng.integers(1, BUCKET), 33, rng.integers(1, BUCKET)], np.int32)
        cache = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), model.init_cache(SLOTS, LENGTH)
        )
        first, cache = prefill(params, cache, tokens, lengths, np.array([0, 2, 4], np.int32))
        out = [first[1]]
        for step in range(8):
            fed = rng.integers(0, 131, SLOTS, dtype=np.int32)
            where = rng.integers(0, LENGTH, SLOTS, dtype=np.int32)
            fed[2], where[2] = mine[33 + step], 33 + step
            logits, cache = decode(params, cache, fed, where)
            out.append(logits[2])
        return np.stack(out)

    reference = run(0)
    for seed in (1, 2):
        np.testing.assert_array_equal(run(seed), reference)


@pytest.mark.parametrize("length, slot", [(0, 1), (9, SLOTS), (9, SLOTS + 7), (9, -1)])
def test_padding_rows_write_nothing(length, slot):
    model, params = tiny.model_and_params("qwen2-tied")
    before = jax.tree.map(lambda x: x + 7.0, model.init_cache(SLOTS, LENGTH))
    tokens = np.ones((1, BUCKET), np.int32)
    prefill = tiny.jit(model.prefill)
    _, after = prefill(params, before, tokens, np.array([length], np.int32), np.array([slot], np.int32))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_one_jitted_step_writes_one_position_per_slot_and_reuses_the_buffers():
    model, params = tiny.model_and_params("qwen3")
    cache = jax.tree.map(lambda x: x + 7.0, model.init_cache(SLOTS, LENGTH))
    before = jax.tree.map(np.array, cache)  # copies: a view would forbid the donation
    positions = np.array([0, 3, 95, 7, 7], np.int32)
    compiled = (
        jax.jit(model.decode, donate_argnums=1).lower(params, cache, np.ones(SLOTS, np.int32), positions).compile()
    )
    _, after = compiled(params, cache, np.ones(SLOTS, np.int32), positions)
    for name, others in (("k", (1, 2)), ("v", (1, 3))):
        for layer, old in zip(after[name], before[name], strict=True):
            changed = (np.asarray(layer) != old).any(axis=others)
            assert [np.flatnonzero(row).tolist() for row in changed] == [[p] for p in positions]
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(before))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_a_step_copies_no_parameters():
    """Given a tree for each layer, a step's temporaries are far smaller than the network; stacked, all is copied."""
    model, _ = tiny.model_and_params("qwen3")
    model = models.Model(dataclasses.replace(model.config, hidden_size=256, mlp_size=1024, num_layers=4))
    stacked = model.abstract_params()
    apart = jax.eval_shape(models.unstack_layers, stacked)
    cache, ints = jax.eval_shape(lambda: model.init_cache(2, 8)), jax.ShapeDtypeStruct((2,), np.int32)

    def temporaries(params):
        steps = jax.jit(lambda p, c, t: jax.lax.fori_loop(0, 4, lambda i, c: model.decode(p, c, t, t)[1], c))
        return steps.lower(params, cache, ints).compile().memory_analysis().temp_size_in_bytes

    layers = sum(4 * x.size for x in jax.tree.leaves(stacked["layers"]))
    assert temporaries(apart) < layers / 4
    assert temporaries(stacked) > layers / 2  # the reason


def test_prompts_wider_than_the_cache_are_refused():
    model, params = tiny.model_and_params("qwen2-tied")
    with pytest.raises(models.ModelError, match="64 tokens do not fit a cache of 32"):
        one = np.ones(1, np.int32)
        model.prefill(params, model.init_cache(1, 32), np.ones((1, 64), np.int32), one, one)
