"""Advantage estimators against numbers worked out by hand and against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import advantages
from tests.models import tiny

REWARDS = np.array([1.0, 0.0, 0.0, 2.0, 5.0, 3.0, 3.0, 3.0])
GROUPS = np.array([0, 0, 2, 0, 3, 4, 4, 4])  # interleaved, ragged; 1 is empty; 2 and 3 singletons; 4 has no variance


def close(got, expected, rtol=2e-6, atol=1e-6):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def test_group_relative_grpo_and_dr_grpo():
    # group 0: 1, 0, 2: mean 1, std 1 (ddof 1), sqrt(2/3) (ddof 0)
    centred = np.array([0, -1, 0, 1, 0, 0, 0, 0.0])
    close(advantages.group_relative(REWARDS, GROUPS, num_groups=5, scale="none"), centred)
    close(advantages.group_relative(REWARDS, GROUPS, num_groups=5), centred / (1 + 1e-6))
    biased = advantages.group_relative(REWARDS, GROUPS, num_groups=5, ddof=0, eps=0.1)
    close(biased, centred / (np.sqrt(2 / 3) + 0.1))


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_get_exactly_zero(reward):
    rewards, ids = np.full(7, reward, np.float32), np.zeros(7, int)
    for options in ({}, {"scale": "none"}, {"eps": 0.0}):
        result = advantages.group_relative(rewards, ids, num_groups=1, **options)
        np.testing.assert_array_equal(result, 0.0)
    for eps in (1e-8, 0.0):
        np.testing.assert_array_equal(advantages.masked_whiten(rewards, np.ones(7), eps=eps), 0.0)


def test_a_reward_that_is_no_number_is_seen_and_in_its_own_group_only():
    rewards = np.where(np.arange(8) == 3, np.nan, REWARDS)  # of group 0
    for function in (advantages.group_relative, advantages.leave_one_out, advantages.asymre):
        np.testing.assert_array_equal(np.isnan(function(rewards, GROUPS, num_groups=5)), GROUPS == 0)
    assert np.isnan(advantages.masked_whiten(rewards, np.ones(8))).all()


def test_padding_rows_count_nowhere():
    rewards, ids = np.append(REWARDS, [np.nan, 7.0]), np.append(GROUPS, [-1, 5])
    for function in (advantages.group_relative, advantages.leave_one_out, advantages.asymre):
        padded = function(rewards, ids, num_groups=5)
        close(padded[:8], function(REWARDS, GROUPS, num_groups=5))
        np.testing.assert_array_equal(padded[8:], 0.0)
    assert not advantages.informative_group_mask(rewards, ids, num_groups=5)[8:].any()


def test_leave_one_out_is_reward_minus_mean_of_the_others():
    # group 0: 1 - (0+2)/2, 0 - (1+2)/2, 2 - (1+0)/2
    expected = [0.0, -1.5, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0]
    close(advantages.leave_one_out(REWARDS, GROUPS, num_groups=5), expected)


def test_asymre_lowers_the_baseline():
    expected = np.array([0, -1, 0, 1, 0, 0, 0, 0.0]) + 0.1
    close(advantages.asymre(REWARDS, GROUPS, num_groups=5), expected)
    close(advantages.asymre(REWARDS, GROUPS, num_groups=5, baseline_shift=0.5), expected - 0.6)


def test_informative_group_mask():
    expected = np.array([True, True, False, True, False, False, False, False])
    function = jax.jit(jax.vmap(lambda rewards: advantages.informative_group_mask(rewards, GROUPS, num_groups=5)))
    np.testing.assert_array_equal(function(np.stack([REWARDS, 0 * REWARDS])), [expected, expected & False])


GAP_MASK = np.array([1, 1, 0, 0, 1, 0])


def test_gae_by_hand_skips_gaps():
    # trained tokens 0, 1, 4 with v = 1, 2, 4 and r = 0, 0, 8; discount .5, lambda .5
    # delta_4 = 8 - 4 = 4; delta_1 = .5·4 - 2 = 0; delta_0 = .5·2 - 1 = 0; A_1 = .25·4 = 1; A_0 = .25
    rewards, values = np.array([0, 0, 99, 99, 8, 99.0]), np.array([1, 2, np.nan, -99, 4, np.inf])
    output = advantages.gae(rewards, values, GAP_MASK, discount=0.5, lambda_=0.5)
    close(output.advantages, [0.25, 1, 0, 0, 4, 0])
    close(output.returns, [1.25, 3, 0, 0, 8, 0])
    assert output[0] is output.advantages  # advantages first
    truncated = advantages.gae(rewards, values, GAP_MASK, discount=0.5, lambda_=0.5, bootstrap_value=16.0)
    close(truncated.advantages, [0.25 + 8 / 16, 1 + 8 / 4, 0, 0, 4 + 8, 0])


def naive_gae(rewards, values, mask, discount, lambda_, bootstrap):
    result, following, carry = np.zeros(len(rewards)), bootstrap, 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            carry = rewards[t] + discount * following - values[t] + discount * lambda_ * carry
            following, result[t] = values[t], carry
    return result


def test_gae_agrees_with_a_loop_and_packed_rows_with_separate_ones():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 4, 33)), rng.normal(size=(2, 4, 33))
    mask, bootstrap = rng.random((2, 4, 33)) < 0.7, rng.normal(size=(2, 4))
    gae, discounted_returns = tiny.jit(advantages.gae), tiny.jit(advantages.discounted_returns)
    got = gae(rewards, values, mask, discount=0.98, lambda_=0.9, bootstrap_value=bootstrap)
    for i in np.ndindex(2, 4):
        close(got.advantages[i], naive_gae(rewards[i], values[i], mask[i], 0.98, 0.9, bootstrap[i]), 1e-4, 1e-5)

    ids = np.repeat([1, 2, 3, 0], [12, 3, 12, 6])
    row = [x[0, 0] for x in (rewards, values, mask)]
    packed = gae(*row, discount=0.98, lambda_=0.9, bootstrap_value=0.5, segment_ids=ids)
    returns = discounted_returns(row[0], row[2], discount=0.9, segment_ids=ids)
    for segment in (1, 2, 3):
        part = [x[ids == segment] for x in row]
        alone = gae(*part, discount=0.98, lambda_=0.9, bootstrap_value=0.5)
        close(packed.advantages[ids == segment], alone.advantages, 1e-5)
        close(packed.returns[ids == segment], alone.returns, 1e-5)
        close(returns[ids == segment], discounted_returns(part[0], part[2], discount=0.9), 1e-5)
    np.testing.assert_array_equal(packed.advantages[ids == 0], 0.0)


def test_discounted_returns():
    rewards = np.array([1.0, 0, 99, 99, 8, 99])
    close(advantages.discounted_returns(rewards, GAP_MASK, discount=0.5), [3, 4, 0, 0, 8, 0])
    close(advantages.discounted_returns(rewards, GAP_MASK), [9, 8, 0, 0, 8, 0])


def test_rows_without_a_token_are_ordinary_input():
    nothing = np.zeros((2, 0))
    assert advantages.gae(nothing, nothing, nothing).returns.shape == (2, 0)
    assert advantages.reinforce_plus_plus(nothing, nothing).shape == (2, 0)


def test_masked_whiten():
    # 1, 2, 3: mean 2, variance 1 (ddof 1), 2/3 (ddof 0)
    values, mask = np.array([[1.0, 2], [np.nan, 3]]), np.array([[1, 1], [0, 1]])
    close(advantages.masked_whiten(values, mask), [[-1, 0], [0, 1]])
    close(advantages.masked_whiten(values, mask, ddof=0), np.array([[-1, 0], [0, 1]]) * np.sqrt(1.5))
    close(advantages.masked_whiten(values, mask, shift_mean=False), [[1, 2], [0, 3]])
    np.testing.assert_array_equal(advantages.masked_whiten(values, np.zeros((2, 2))), 0.0)


def test_reinforce_plus_plus():
    # returns 3, 2 and 1 at the trained tokens -> 1, 0, -1
    rewards, mask = np.array([[1.0, 2], [1, 9]]), np.array([[1, 1], [1, 0]])
    reinforce_plus_plus = tiny.jit(advantages.reinforce_plus_plus)
    close(reinforce_plus_plus(rewards, mask), [[1, 0], [-1, 0]])
    packed = reinforce_plus_plus(rewards.reshape(-1), np.ones(4), segment_ids=np.array([1, 1, 2, 0]))
    close(packed, [1, 0, -1, 0])


def test_reinforce_plus_plus_baseline():
    # group-centred ±1 on 1 and 3 tokens: mean .5, variance ((1.5)² + 3·.25)/3 = 1
    result = advantages.reinforce_plus_plus_baseline(
        np.array([0.0, 2]), np.array([0, 0]), np.array([[1, 0, 0], [1, 1, 1]]), num_groups=1
    )
    close(result, [[-1.5, 0, 0], [0.5, 0.5, 0.5]])


def test_overlong_penalty():
    lengths = jnp.array([0, 16384, 18432, 20480, 30000])
    close(advantages.overlong_penalty(lengths, max_length=20480, buffer=4096), [0, 0, -0.5, -1, -1])


FUNCTIONS = {
    "group_relative": lambda r: advantages.group_relative(r, GROUPS, num_groups=5),
    "leave_one_out": lambda r: advantages.leave_one_out(r, GROUPS, num_groups=5),
    "asymre": lambda r: advantages.asymre(r, GROUPS, num_groups=5),
    "reinforce_plus_plus": lambda r: advantages.reinforce_plus_plus(r, np.ones(8), discount=0.9),
    "baseline": lambda r: advantages.reinforce_plus_plus_baseline(r, GROUPS, np.ones((8, 2)), num_groups=5),
    "gae": lambda r: advantages.gae(r, 0.5 * r, np.arange(8) % 3 > 0, discount=0.9, lambda_=0.8).advantages,
    "discounted_returns": lambda r: advantages.discounted_returns(r, np.arange(8) % 3 > 0, discount=0.9),
    "masked_whiten": lambda r: advantages.masked_whiten(r, np.arange(8) % 3 > 0),
    "overlong_penalty": lambda r: advantages.overlong_penalty(r, max_length=4, buffer=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_grad_and_bf16(name):
    function = FUNCTIONS[name]
    batch = jnp.array(np.stack([REWARDS, np.zeros(8), REWARDS[::-1] * 2]), jnp.float32)
    once = tiny.jit(function)
    rows = [once(row) for row in batch]
    close(tiny.jit(jax.vmap(function))(batch), np.stack(rows), 1e-5)
    weights = jnp.arange(np.size(rows[0]), dtype=jnp.float32).reshape(rows[0].shape)
    gradient = tiny.jit(jax.vmap(jax.grad(lambda r: (function(r) * weights).sum())))(batch)
    assert np.isfinite(gradient).all()
    low = once(batch[0].astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    close(low, rows[0], 1e-2, 1e-2)


def test_group_gradient_by_hand():
    # d/dr_0 of (r_0 - mean) with three in the group
    gradient = jax.grad(lambda r: advantages.group_relative(r, GROUPS, num_groups=5, scale="none")[0])(REWARDS)
    close(gradient, [2 / 3, -1 / 3, 0, -1 / 3, 0, 0, 0, 0])


def test_gradient_is_finite_where_the_variance_underflows():
    rewards = jnp.array([0.0, 1e-30, 1.0, 1.0])  # differ, but their variance is 0 in float32; and equal ones
    ids = np.array([0, 0, 1, 1])
    gradient = jax.grad(lambda r: advantages.group_relative(r, ids, num_groups=2)[1])(rewards)
    close(gradient, [-0.5e6, 0.5e6, 0, 0], 1e-3)


ERRORS = {
    "scale='sdt'": lambda: advantages.group_relative(REWARDS, GROUPS, num_groups=5, scale="sdt"),
    r"group_ids has shape \(7,\), expected \(8,\)": lambda: advantages.leave_one_out(REWARDS, GROUPS[:7], num_groups=5),
    "group_ids has dtype float32": lambda: advantages.asymre(REWARDS, GROUPS.astype(np.float32), num_groups=5),
    r"rewards has shape \(2, 4\), expected \[N\]": lambda: advantages.asymre(
        REWARDS.reshape(2, 4), GROUPS, num_groups=5
    ),
    "num_groups=.* must be a Python int": lambda: jax.jit(
        lambda n: advantages.group_relative(REWARDS, GROUPS, num_groups=n)
    )(5),
    "num_groups=0 must be at least 1": lambda: advantages.leave_one_out(REWARDS, GROUPS, num_groups=0),
    r"rewards has shape \(3,\), expected \(6,\)": lambda: advantages.gae(np.ones(3), np.ones(6), GAP_MASK),
    r"mask has shape \(6,\), expected \(3,\)": lambda: advantages.discounted_returns(np.ones(3), GAP_MASK),
    r"bootstrap_value has shape \(2,\)": lambda: advantages.gae(
        np.ones(6), np.ones(6), GAP_MASK, bootstrap_value=np.ones(2)
    ),
    "mask is None": lambda: advantages.masked_whiten(np.ones(3), None),
    "segment_ids has dtype float": lambda: advantages.discounted_returns(*np.ones((2, 3)), segment_ids=np.ones(3)),
    r"expected \[N, T\] with N=8": lambda: advantages.reinforce_plus_plus_baseline(
        REWARDS, GROUPS, np.ones((3, 2)), num_groups=5
    ),
    "buffer=0 must be above 0": lambda: advantages.overlong_penalty(3, max_length=4, buffer=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
