"""Corrections and diagnostics against numbers worked out by hand; what they share: test_objective_properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import corrections
from tests.models import tiny

LOG = np.log
m2po_mask = tiny.jit(corrections.m2po_mask)
m2po_all_tokens_mask = tiny.jit(corrections.m2po_all_tokens_mask)
SAMPLER = np.array([-1.0, -1.0, -1.0, -1.0])
TRAIN = SAMPLER + LOG([0.4, 1.5, 3.0, 6.0])


def close(got, expected, rtol=2e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6)


def test_token_weights():
    close(corrections.tis_weights(TRAIN, SAMPLER), [0.4, 1.5, 2.0, 2.0])
    close(corrections.tis_weights(TRAIN, SAMPLER, cap=5.0), [0.4, 1.5, 3.0, 5.0])
    close(corrections.icepop_weights(TRAIN, SAMPLER), [0.0, 1.5, 3.0, 0.0])
    close(corrections.icepop_weights(TRAIN, SAMPLER, low=0.1, high=2.0), [0.4, 1.5, 0.0, 0.0])
    mask = np.array([0, 1, 1, 0])
    close(corrections.tis_weights(TRAIN, SAMPLER, mask), [0.0, 1.5, 2.0, 0.0])


@pytest.mark.parametrize(
    ("kind", "ratios"),
    # ratios (2, 1/2), (4, 1) and (1, -): geometric 1, 2, 1; arithmetic 1.25, 2.5, 1; product 1, 4, 1
    [("geometric", [1.0, 2.0, 1.0]), ("arithmetic", [1.25, 2.5, 1.0]), ("product", [1.0, 4.0, 1.0])],
)
def test_sequence_is_mask(kind, ratios):
    sampler = np.full((3, 2), -5.0)
    train = sampler + LOG(np.array([[2.0, 0.5], [4.0, 1.0], [1.0, 100.0]]))
    mask = np.array([[1, 1], [1, 1], [1, 0]])
    for row, ratio in enumerate(ratios):
        for low, high, kept in ((ratio - 0.01, ratio + 0.01, True), (0, ratio - 0.01, False), (ratio + 0.01, 9, False)):
            keep = corrections.sequence_is_mask(train, sampler, mask, low=low, high=high, kind=kind)
            np.testing.assert_array_equal(keep[row], mask[row].astype(bool) & kept)


def test_bounds_are_on_the_ratio_and_not_its_inverse():
    # verl's seq_mean_k1 mode with "0.1_1.2" would keep a ratio of 5 and drop one of .5
    train, sampler, mask = np.array([[LOG(5.0)], [LOG(0.5)]]) - 9, np.full((2, 1), -9.0), np.ones((2, 1))
    keep = corrections.sequence_is_mask(train, sampler, mask, low=0.1, high=1.2)
    np.testing.assert_array_equal(keep[:, 0], [False, True])


def test_opsm_drops_only_bad_sequences_that_the_policy_left():
    behavior = np.full((4, 2), -1.0)
    logprobs = behavior - np.array([[0.2, 0.6], [0.2, 0.6], [0.1, 0.1], [-3.0, -3.0]])  # means .4, .4, .1, -3
    advantages = np.array([[-1.0], [1.0], [-1.0], [-1.0]]) * np.ones((4, 2))
    keep = corrections.opsm_mask(logprobs, behavior, advantages, np.ones((4, 2)), delta=0.3)
    np.testing.assert_array_equal(keep[:, 0], [False, True, True, True])


def test_dppo_trusts_by_difference_of_probabilities():
    p, q = np.array([0.8, 0.8, 0.1, 0.1, 0.02, 0.5]), np.array([0.5, 0.5, 0.5, 0.5, 0.001, 0.6])
    advantages = np.array([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    # up too far; up against A; down too far; down against A; a 20-fold ratio of a rare token; -.1 is within .2
    keep = corrections.dppo_mask(LOG(p), LOG(q), advantages)
    np.testing.assert_array_equal(keep, [False, True, False, True, True, True])


def m2po_by_loop(squares, budget):
    """The authors' threshold on sorted squares of harmful tokens, as described in the paper's code, in plain Python."""
    squares = sorted(squares)
    if sum(squares) <= budget * len(squares):
        return np.inf
    kept = -1.0
    for i, square in enumerate(squares):
        if sum(squares[: i + 1]) + square * (len(squares) - i - 1) >= budget * len(squares):
            break
        kept = square
    return kept


def test_m2po_by_hand():
    # Harmful: |log r| = .1, .5, 1 of A>0 tokens; the others moved against their advantage. Budget .1: capping at .1
    # costs .03, capping at .5 costs .01 + .25 + .25 = .51 > .3 -> threshold .1. But r = e^-.5 = .61 < .7 for A<0 only.
    log_ratio = np.array([0.1, 0.5, 1.0, -2.0, 2.0])
    advantages = np.array([1.0, 1.0, 1.0, 1.0, -1.0])
    keep = m2po_mask(log_ratio - 9, np.full(5, -9.0), advantages, np.ones(5), budget=0.1)
    np.testing.assert_array_equal(keep, [True, False, False, True, True])
    # within [.7, 1.5] nothing is dropped, however small the budget; e^.3 = 1.35, e^-.3 = .74
    small = np.array([0.3, 0.3, -0.3])
    keep = m2po_mask(small - 9, np.full(3, -9.0), np.array([1, 1, -1.0]), np.ones(3), budget=1e-6)
    assert keep.all()
    # a mean of squares inside the budget: no constraint at all
    keep = m2po_mask(log_ratio - 9, np.full(5, -9.0), advantages, np.ones(5), budget=0.5)
    assert keep.all()


@pytest.mark.parametrize("budget", [0.01, 0.04, 0.3, 5.0])
def test_m2po_agrees_with_a_loop(budget):
    rng = np.random.default_rng(2)
    log_ratio, mask = rng.normal(0, 1, (4, 30)).astype(np.float32), rng.random((4, 30)) < 0.8
    advantages = np.sign(rng.normal(size=(4, 30)))
    harmful = mask & (advantages * log_ratio > 0)
    threshold = m2po_by_loop(np.square(log_ratio[harmful]).tolist(), budget)
    ratio = np.exp(log_ratio)
    expected = mask & (~harmful | ((ratio >= 0.7) & (ratio <= 1.5)) | (np.square(log_ratio) <= threshold * (1 + 1e-6)))
    keep = m2po_mask(log_ratio, np.zeros((4, 30)), advantages, mask, budget=budget)
    np.testing.assert_array_equal(keep, expected)


def test_m2po_of_all_tokens_drops_the_largest_until_the_mean_fits():
    # squares .01, .04, .25, 1 (masked: 9). Means of the smallest k: .01, .025, .1, .325
    log_ratio = np.array([1.0, -0.2, 3.0, 0.1, 0.5]) - 9
    behavior, mask = np.full(5, -9.0), np.array([1, 1, 0, 1, 1])
    for budget, expected in ((0.04, [0, 1, 0, 1, 0]), (0.2, [0, 1, 0, 1, 1]), (1.0, mask), (1e-9, [0, 0, 0, 1, 0])):
        keep = m2po_all_tokens_mask(log_ratio, behavior, mask, budget=budget)
        np.testing.assert_array_equal(keep, np.array(expected, bool))
    assert not m2po_all_tokens_mask(log_ratio, behavior, np.zeros(5)).any()


def test_interpolate_proximal_logprobs():
    # lags 4, 1, 0 and a prompt token at current version 9: alpha 3/4, 0, 0, 0
    behavior, current = LOG(np.array([0.1, 0.1, 0.1, 0.1])), LOG(np.array([0.5, 0.5, 0.5, 0.5]))
    versions = np.array([5, 8, 9, -1])
    close(
        corrections.interpolate_proximal_logprobs(behavior, current, versions, 9),
        [0.25 * LOG(0.1) + 0.75 * LOG(0.5), LOG(0.1), LOG(0.1), LOG(0.1)],
    )
    linear = corrections.interpolate_proximal_logprobs(behavior, current, versions, jnp.int32(9), method="linear")
    close(linear, LOG([0.25 * 0.1 + 0.75 * 0.5, 0.1, 0.1, 0.1]))
    per_token = corrections.interpolate_proximal_logprobs(behavior, current, versions, np.array([7, 12, 9, 9]))
    close(per_token, [(LOG(0.1) + LOG(0.5)) / 2, 0.25 * LOG(0.1) + 0.75 * LOG(0.5), LOG(0.1), LOG(0.1)])


@pytest.mark.parametrize("method", ["loglinear", "linear"])
def test_interpolation_is_detached_and_survives_impossible_tokens(method):
    behavior, versions = jnp.array([-jnp.inf, -jnp.inf, -2.0]), np.array([-1, 3, 3])

    def total(current):
        result = corrections.interpolate_proximal_logprobs(behavior, current, versions, 9, method=method)
        return jnp.where(jnp.isfinite(result), result, 0).sum()

    result = corrections.interpolate_proximal_logprobs(behavior, jnp.array([-1.0, -jnp.inf, -1.0]), versions, 9)
    assert not np.isnan(result).any() and result[0] == -jnp.inf
    np.testing.assert_array_equal(jax.grad(total)(jnp.array([-1.0, -3.0, -1.0])), 0.0)


def test_ratio_diagnostics():
    # r = 2, 1/2 | 4; the fourth place is masked
    other = np.full((2, 2), -5.0)
    logprobs = other + LOG(np.array([[2.0, 0.5], [4.0, 1e6]]))
    mask = np.array([[1, 1], [1, 0]])
    got = corrections.ratio_diagnostics(logprobs, other, mask)
    r = np.array([2.0, 0.5, 4.0])
    expected = {
        "ratio_mean": (r.sum(), 3),
        "ratio_second_moment": ((r**2).sum(), 3),
        "k1_kl": (-LOG(r).sum(), 3),
        "k3_kl": ((r - 1 - LOG(r)).sum(), 3),
        "chi_square": ((r**2 - 1).sum(), 3),
        "sequence_ratio_max": (2.0 + 4.0, 2),
        "sequence_chi_square": (0.0 + 15.0, 2),
    }
    assert set(got) == set(expected)
    for name, (total, count) in expected.items():
        close(got[name].sum, total, 1e-5)
        assert float(got[name].denominator) == count
    summary = corrections.summarize(got)
    close(summary["effective_sample_size"], r.mean() ** 2 / (r**2).mean(), 1e-5)
    close(summary["ratio_std"], r.std(), 1e-5)
    close(corrections.max_ratio(logprobs, other, mask), 4.0, 1e-5)


def test_diagnostics_add_up_over_micro_batches():
    rng = np.random.default_rng(3)
    train, sampler = rng.normal(-2, 1, (2, 6, 5))
    mask = rng.random((6, 5)) < 0.6
    for function in (corrections.ratio_diagnostics, corrections.mismatch_statistics):
        whole = corrections.summarize(function(train, sampler, mask))
        parts = [function(train[i : i + 2], sampler[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
        added = corrections.summarize({name: sum(part[name] for part in parts) for name in parts[0]})
        for name in whole:
            close(added[name], whole[name], 1e-4)


def test_diagnostics_of_packed_rows_are_those_of_padded_ones_also_under_jit():
    rng = np.random.default_rng(5)
    padded = rng.normal(-2, 1, (3, 2, 4))  # current, other, advantages; two sequences, of 4 and 2 tokens
    mask = np.array([[1, 0, 1, 1], [1, 1, 0, 0]])
    packed = np.concatenate([padded[:, 0], padded[:, 1, :2], np.full((3, 1), np.nan)], axis=-1)[:, None]
    packed_mask, ids = np.array([[1, 0, 1, 1, 1, 1, 1]]), np.array([[1, 1, 1, 1, 2, 2, 0]])
    for function, places in ((corrections.ratio_diagnostics, [0, 1]), (corrections.nll_balance, [0, 2])):
        expected = function(*padded[places], mask)
        compiled = tiny.jit(lambda *arrays, f=function: f(*arrays, segment_ids=ids, num_segments=2))
        for name, pair in compiled(*packed[places], packed_mask).items():
            close(pair, expected[name], 1e-5)


def test_mismatch_statistics_agree_with_numpy():
    rng = np.random.default_rng(4)
    sampler = LOG(rng.uniform(0.05, 0.95, (3, 50)))
    train = sampler + rng.normal(0, 0.02, (3, 50))
    mask = rng.random((3, 50)) < 0.7
    got = corrections.summarize(corrections.mismatch_statistics(train, sampler, mask))
    d, p, q = (train - sampler)[mask], np.exp(train[mask]), np.exp(sampler[mask])
    close(got["logprob_difference"], d.mean(), 1e-4)
    close(got["logprob_abs_difference"], np.abs(d).mean(), 1e-4)
    close(got["logprob_difference_std"], d.std(), 1e-4)
    close(got["probability_abs_difference"], np.abs(p - q).mean(), 1e-4)
    close(got["k3_kl"], (np.expm1(d) - d).mean(), 1e-3)
    close(got["effective_sample_size"], np.exp(d).mean() ** 2 / np.exp(2 * d).mean(), 1e-5)
    close(got["probability_correlation"], np.corrcoef(p, q)[0, 1], 1e-4)


@pytest.mark.parametrize("nll", [1.0, 1e-3])
def test_spread_and_correlation_hold_where_policies_are_sure_and_nearly_equal(nll):
    """Sums of squares lose this: a variance of 1e-6 beside a mean square of 1 is below float32's last digits."""
    rng = np.random.default_rng(6)
    sampler = -rng.exponential(nll, (8, 5000)).astype(np.float32)
    train = np.minimum(sampler * rng.normal(1.0, 0.1, sampler.shape), 0).astype(np.float32)
    pairs = corrections.mismatch_statistics(train, sampler, np.ones_like(train))
    pairs |= corrections.ratio_diagnostics(train, sampler, np.ones_like(train))
    got = corrections.summarize(pairs)
    p, q = np.exp(train.astype(np.float64)), np.exp(sampler.astype(np.float64))
    close(got["probability_correlation"], np.corrcoef(p.ravel(), q.ravel())[0, 1], 1e-3)
    np.testing.assert_allclose(got["ratio_std"], (p / q).std(), rtol=1e-3)
    np.testing.assert_allclose(got["probability_difference"], (p - q).mean(), rtol=1e-2)


def test_masked_and_clip_fractions():
    keep, mask = np.array([1.0, 0.0, 0.0, 2.0]), np.array([1, 1, 0, 1])
    assert corrections.masked_fraction(keep, mask) == (1.0, 3.0)
    old = np.full(4, -9.0)
    logprobs = old + LOG([0.5, 1.5, 0.5, 1.5])
    advantages = np.array([-1.0, 1.0, 1.0, 1.0])
    low, high = corrections.clip_fractions(logprobs, old, advantages, np.array([1, 1, 1, 0]))
    assert (low, high) == ((1.0, 3.0), (1.0, 3.0))
    # GSPO's: .75 for the first sequence (a geometric mean), 1.5 for the second; tokens out of bounds clip nothing
    logprobs = old + LOG([0.5, 1.125, 0.9, 2.5])
    given = {"segment_ids": np.array([1, 1, 2, 2]), "num_segments": 2, "clip_low": 0.2, "clip_high": 0.45}
    low, high = corrections.clip_fractions(logprobs, old, np.ones(4), np.ones(4), per_sequence=True, **given)
    assert (low, high) == ((0.0, 4.0), (2.0, 4.0))
    low, high = corrections.clip_fractions(logprobs, old, -np.ones(4), np.ones(4), per_sequence=True, **given)
    assert (low, high) == ((2.0, 4.0), (0.0, 4.0))


def test_nll_balance():
    logprobs = np.array([[-1.0, -3.0], [-0.5, -9.0], [-1e-4, -1e-4]])
    advantages = np.array([[1.0], [-2.0], [1.0]]) * np.ones((3, 2))
    got = corrections.nll_balance(logprobs, advantages, np.array([[1, 1], [1, 0], [1, 1]]))
    assert got["negative_mass"] == (1.0, 3.0) and got["negative_nll"] == (0.5, 1.0)
    close(got["positive_mass"].sum, 2.0001)
    assert float(got["positive_nll"].denominator) == 2 and got["floor_fraction"] == (1.0, 3.0)


def test_summaries_of_nothing_are_zero():
    nothing = np.zeros((2, 3))
    for function in (corrections.ratio_diagnostics, corrections.mismatch_statistics, corrections.nll_balance):
        for value in corrections.summarize(function(nothing, nothing, nothing)).values():
            assert float(value) == 0.0


ARRAYS = {name: np.zeros((2, 3)) for name in ("a", "b", "c")}
ERRORS = {
    r"sampler has shape \(2, 2\), expected \(2, 3\), the shape of train_old": lambda: corrections.tis_weights(
        np.zeros((2, 3)), np.zeros((2, 2))
    ),
    "kind='harmonic' is not one of 'geometric'": lambda: corrections.sequence_is_mask(
        *ARRAYS.values(), low=0, high=1, kind="harmonic"
    ),
    "method='rollout' is not one of 'loglinear', 'linear'": lambda: corrections.interpolate_proximal_logprobs(
        *ARRAYS.values(), 3, method="rollout"
    ),
    r"behavior_version has shape \(2,\)": lambda: corrections.interpolate_proximal_logprobs(
        np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2, int), 3
    ),
    r"keep has shape \(3,\), expected \(2, 3\)": lambda: corrections.masked_fraction(np.zeros(3), np.zeros((2, 3))),
    "segment_ids needs num_segments": lambda: corrections.opsm_mask(
        *ARRAYS.values(), np.ones((2, 3)), delta=1.0, segment_ids=np.ones((2, 3), int)
    ),
    "mask is None": lambda: corrections.m2po_all_tokens_mask(np.zeros(3), np.zeros(3), None),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
