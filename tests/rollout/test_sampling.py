"""Tokens come from exactly the distribution whose log-probs are returned."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax.rollout.sampling import draw, forbid, request_keys, sampling_logprobs


def by_hand(logits, temperature, top_k, top_p):
    """The same distribution token by token, in float64."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        temperature, top_k, top_p = 1.0, 0, 1.0
    weights = np.exp(logits / temperature - np.max(logits / temperature))
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= top_p and kept:
            break
        kept.append(i)
        mass += weights[i] / total
    result = np.zeros_like(weights)
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def test_distribution_is_that_of_temperature_then_top_k_then_top_p():
    settings = list(itertools.product([0.0, 0.5, 1.0, 2.0], [0, 1, 3, 99], [0.01, 0.5, 0.9, 1.0]))
    logits = np.random.default_rng(0).normal(size=(len(settings), 7)).astype(np.float32) * 2
    temperature, top_k, top_p = (np.asarray(column, dtype) for column, dtype in zip(
        zip(*settings), (np.float32, np.int32, np.float32)
    ))  # fmt: skip
    got = np.exp(jax.jit(sampling_logprobs)(logits, temperature, top_k, top_p))
    want = np.stack([by_hand(row, *setting) for row, setting in zip(logits, settings)])
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_hand_numbers():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 3))
    got = np.exp(sampling_logprobs(logits, jnp.ones(3), jnp.asarray([2, 0, 3]), jnp.asarray([1.0, 0.6, 0.8])))
    # The last row: of the best three, 0.5/0.95 = 0.526 and 0.3/0.95 = 0.316 together reach 0.8.
    np.testing.assert_allclose(got, [[0.625, 0.375, 0, 0]] * 3, atol=1e-6)


def test_rows_without_limits_are_untouched_by_rows_with_limits():
    logits = np.random.default_rng(1).normal(size=(2, 50)).astype(np.float32)
    one, k0, k5 = np.ones(2, np.float32), np.zeros(2, np.int32), np.asarray([5, 0], np.int32)
    alone, mixed = sampling_logprobs(logits, one, k0, one), sampling_logprobs(logits, one, k5, one)
    np.testing.assert_array_equal(alone[1], mixed[1])
    assert np.isinf(mixed[0]).sum() == 45


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.5, 0, 0.8)])
def test_drawn_frequencies_follow_the_log_probs(setting):
    draws, logits = 20_000, np.asarray([0.0, 1.0, -1.0, 2.0, 0.5, -3.0], np.float32)
    columns = tuple(np.full(draws, x, t) for x, t in zip(setting, (np.float32, np.int32, np.float32)))
    logprobs = sampling_logprobs(np.tile(logits, (draws, 1)), *columns)
    identity = np.stack([np.full(draws, 3), np.arange(draws) // 100 - 50, np.arange(draws) % 4], 1).astype(np.int32)
    positions = (np.arange(draws) % 100).astype(np.int32)
    tokens, chosen = jax.jit(draw)(logprobs, request_keys(identity), positions, columns[0])
    want = by_hand(logits, *setting)
    counts = np.bincount(tokens, minlength=6)
    assert not counts[want == 0].any()
    kept = want > 0
    chi_square = ((counts[kept] - draws * want[kept]) ** 2 / (draws * want[kept])).sum()
    assert chi_square < 25  # 5 degrees of freedom: one in ten thousand; the keys are fixed
    np.testing.assert_allclose(np.exp(chosen), want[np.asarray(tokens)], atol=1e-5)


def test_greedy_takes_the_most_probable_token_at_log_probs_of_temperature_one():
    logits = np.asarray([[1.0, 3.0, 2.0]], np.float32)
    zero, none, all_ = np.zeros(1, np.float32), np.ones(1, np.int32), np.full(1, 0.1, np.float32)
    logprobs = sampling_logprobs(logits, zero, none, all_)
    for position in range(20):
        token, logprob = draw(logprobs, request_keys(np.zeros((1, 3), np.int32)), np.asarray([position]), zero)
        assert int(token[0]) == 1
    np.testing.assert_allclose(logprob[0], 3 - np.log(np.exp([1.0, 3.0, 2.0]).sum()), rtol=1e-6)


def test_random_numbers_depend_on_each_of_seed_group_sample_and_position():
    base = (1, 5, 2)
    identities = np.asarray([base, (2, 5, 2), (1, 6, 2), (1, -5, 2), (1, 5, 3), (1, 2, 5)], np.int32)
    keys = jax.random.key_data(request_keys(identities))
    assert len({tuple(np.asarray(key)) for key in keys}) == len(identities)
    logprobs = jnp.full((64, 1000), -np.log(1000.0), jnp.float32)
    same = request_keys(np.tile(np.asarray(base, np.int32), (64, 1)))
    tokens, _ = draw(logprobs, same, jnp.arange(64, dtype=jnp.int32), jnp.ones(64))
    assert len(set(np.asarray(tokens).tolist())) > 50


def test_forbidden_tokens_have_no_probability_in_the_rows_asked_for():
    logits = jnp.zeros((2, 4))
    stops = np.asarray([[1, 3, -1]] * 2, np.int32)
    got = np.exp(sampling_logprobs(forbid(logits, stops, np.asarray([True, False])), *(
        jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2)
    )))  # fmt: skip
    np.testing.assert_allclose(got, [[0.5, 0, 0.5, 0], [0.25] * 4], atol=1e-6)
