"""Each loss against numbers worked out by hand, value and gradient; what they share: test_objective_properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import losses
from tests.models import tiny

E = np.exp


def value_and_gradient(function, logprobs):
    """Unreduced values, and the gradient of their sum, with respect to the log-probs."""
    def total(logprobs):
        values = function(logprobs)
        return values.sum(), values

    gradient, values = tiny.jit(jax.grad(total, has_aux=True))(jnp.array(logprobs, jnp.float32))
    return np.asarray(values), np.asarray(gradient)


def check(function, logprobs, value, gradient, rtol=2e-6):
    got_value, got_gradient = value_and_gradient(function, logprobs)
    np.testing.assert_allclose(got_value, value, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(got_gradient, gradient, rtol=rtol, atol=1e-6)


def test_importance_log_ratio_is_clamped_masked_and_differentiable():
    old = jnp.array([-1.0, -1.0, -30.0, -jnp.inf, -2.0])
    mask = jnp.array([1, 1, 1, 1, 0])
    # .5 inside; 29.5 -> 20 and no gradient; both -inf -> 0; masked -> 0
    check(
        lambda lp: losses.importance_log_ratio(lp, old, mask),
        [-0.5, -1.2, -0.5, -jnp.inf, -7.0],
        [0.5, -0.2, 20.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0, 0.0],
    )
    check(lambda lp: losses.importance_log_ratio(lp, old[:2], max_log_ratio=0.3), [-0.5, -1.2], [0.3, -0.2], [0.0, 1.0])


RATIOS = np.array([1.5, 0.5, 1.1, 0.5, 5.0])
SIGNS = np.array([1.0, 1.0, -1.0, -1.0, -1.0])
OLD = np.array([-3.0, -1.0, -2.0, -0.5, -4.0])


def test_ppo_clip():
    # r=1.5,A=1: clipped at 1.28. r=.5,A=1: not clipped on that side. r=1.1,A=-1: inside. r=.5,A=-1: clipped at .8.
    # r=5,A=-1: unbounded, unless dual clip c=3 holds it.
    value, gradient = [-1.28, -0.5, 1.1, 0.8, 5.0], [0.0, -0.5, 1.1, 0.0, 5.0]
    logprobs = OLD + np.log(RATIOS)
    check(lambda lp: losses.ppo_clip_loss(lp, OLD, SIGNS, clip_low=0.2, clip_high=0.28), logprobs, value, gradient)
    value[4], gradient[4] = 3.0, 0.0
    check(
        lambda lp: losses.ppo_clip_loss(lp, OLD, SIGNS, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
        logprobs, value, gradient,
    )  # fmt: skip


LP, PROX = [-1.0, -2.0, -0.5, -3.0], np.array([-1.1, -1.5, -0.5, -2.5])
BEHAV, ADV = np.array([-1.3, -1.4, -2.5, -2.6]), np.array([1.0, -1.0, 2.0, -0.5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, -3.740508), ({"weight_cap": 5.0}, -0.045980), ({"weight_cap": 5.0, "cap_mode": "clamp"}, -2.545980)],
)
def test_decoupled_ppo_reference_vector(options, expected):
    per_token = losses.decoupled_ppo_loss(jnp.array(LP), PROX, BEHAV, ADV, **options)
    total, count = losses.aggregate(per_token, np.ones(4))
    assert float(count) == 4  # also where a token is masked by the cap
    assert float(total / count) == pytest.approx(expected, abs=1e-6)


def test_decoupled_ppo_per_token_and_gradient():
    # w = e^[.2, -.1, 2, .1], u = e^[.1, -.5, 0, -.5]; tokens 2 and 4 sit at the clip .8 (A<0), so have no gradient
    value = [-E(0.3), E(-0.1) * 0.8, -2 * E(2.0), E(0.1) * 0.4]
    gradient = [-E(0.3), 0.0, -2 * E(2.0), 0.0]
    check(lambda lp: losses.decoupled_ppo_loss(lp, PROX, BEHAV, ADV), LP, value, gradient)
    value[2] = gradient[2] = 0.0
    check(lambda lp: losses.decoupled_ppo_loss(lp, PROX, BEHAV, ADV, weight_cap=5.0), LP, value, gradient)
    value[2] = gradient[2] = -2 * 5.0
    check(
        lambda lp: losses.decoupled_ppo_loss(lp, PROX, BEHAV, ADV, weight_cap=5.0, cap_mode="clamp"),
        LP, value, gradient,
    )  # fmt: skip


def test_decoupled_ppo_with_equal_policies_is_ppo_and_applies_the_weight_otherwise():
    lp = jnp.array(LP)
    np.testing.assert_array_equal(
        losses.decoupled_ppo_loss(lp, BEHAV, BEHAV, ADV), losses.ppo_clip_loss(lp, BEHAV, ADV)
    )
    np.testing.assert_allclose(
        losses.decoupled_ppo_loss(lp, PROX, BEHAV, ADV),
        E(PROX - BEHAV) * losses.ppo_clip_loss(lp, PROX, ADV),
        rtol=1e-6,
    )


def test_a_weight_exactly_at_the_cap_is_kept():
    loss = losses.decoupled_ppo_loss(jnp.zeros(1), np.zeros(1), np.zeros(1), np.ones(1), weight_cap=1.0)
    assert float(loss[0]) == -1.0


def test_reinforce():
    check(lambda lp: losses.reinforce_loss(lp, ADV), LP, [1.0, -2.0, 1.0, -1.5], -ADV)
    weights = np.array([2.0, 0.5, 0.0, 1.0])
    check(
        lambda lp: losses.reinforce_loss(lp, ADV, weights=weights), LP, [2.0, -1.0, 0.0, -1.5], -ADV * weights
    )


def test_reinforce_weighted_by_the_ratio_has_the_gradient_of_importance_sampling():
    lp = jnp.array(LP)
    weighted = jax.grad(lambda lp: losses.reinforce_loss(lp, ADV, weights=jnp.exp(lp - BEHAV)).sum())(lp)
    direct = jax.grad(lambda lp: -(ADV.astype(np.float32) * jnp.exp(lp - BEHAV.astype(np.float32))).sum())(lp)
    np.testing.assert_allclose(weighted, direct, rtol=1e-6)


def test_cispo_bounds_are_absolute_and_clipped_tokens_keep_a_gradient():
    behavior = np.array([-2.0, -2.0, -2.0])
    logprobs = behavior + np.log([3.0, 0.5, 1.5])
    # weights 2 (capped), .8 (raised), 1.5
    weights, advantages = np.array([2.0, 0.8, 1.5]), np.array([1.0, -1.0, 2.0])
    check(
        lambda lp: losses.cispo_loss(lp, behavior, advantages, ratio_min=0.8, ratio_max=2.0),
        logprobs, -weights * advantages * logprobs, -weights * advantages,
    )  # fmt: skip
    weights[1] = 0.5
    for loss in (losses.cispo_loss, losses.aipo_loss):
        check(
            lambda lp, loss=loss: loss(lp, behavior, advantages, ratio_max=2.0),
            logprobs, -weights * advantages * logprobs, -weights * advantages,
        )  # fmt: skip


def test_gspo():
    old, mask = np.array([-1.0, -2.0, -9.0]), np.array([1, 1, 0])
    logprobs = old + np.array([0.1, 0.3, 5.0])  # mean .2 over the two trained tokens
    s = E(0.2)
    # sum over tokens of -s; d/dlp_t = -2 s · (1/2)
    check(
        lambda lp: losses.gspo_loss(lp, old, np.ones(3), mask, clip_high=0.3), logprobs, [-s, -s, 0.0], [-s, -s, 0.0]
    )
    check(lambda lp: losses.gspo_loss(lp, old, np.ones(3), mask), logprobs, [-1.0004, -1.0004, 0.0], np.zeros(3))
    check(lambda lp: losses.gspo_loss(lp, old, -np.ones(3), mask), logprobs, [s, s, 0.0], [s, s, 0.0])


def test_gspo_gradient_is_gspo_tokens_for_one_advantage_per_sequence():
    rng = np.random.default_rng(0)
    old = rng.normal(-2, 1, (3, 5)).astype(np.float32)
    logprobs = jnp.asarray(old + rng.normal(0, 0.1, (3, 5)).astype(np.float32))
    mask = np.arange(5) < np.array([[5], [3], [1]])
    advantages = np.broadcast_to(np.array([[1.0], [-2.0], [0.5]], np.float32), (3, 5))

    def token_form(lp):  # GSPO-token: value s, gradient at its own token
        mean = jnp.where(mask, lp - old, 0).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True).astype(np.float32)
        s = jax.lax.stop_gradient(jnp.exp(mean)) * jnp.exp(lp - jax.lax.stop_gradient(lp))
        return jnp.where(mask, jnp.maximum(-advantages * s, -advantages * jnp.clip(s, 0.9, 1.1)), 0)

    for mode in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum"):
        def objective(lp, loss, mode=mode):
            return losses.aggregate(loss(lp), mask, mode=mode).mean()

        ours = jax.grad(objective)(
            logprobs, lambda lp: losses.gspo_loss(lp, old, advantages, mask, clip_low=0.1, clip_high=0.1)
        )
        np.testing.assert_allclose(ours, jax.grad(objective)(logprobs, token_form), rtol=1e-5, atol=1e-7)


def test_topr_weighs_bad_trajectories_by_their_whole_ratio():
    behavior = np.array([[-1.5, -0.8], [-1.5, -0.8], [-3.0, -3.0]])
    logprobs = np.array([[-2.0, -1.0], [-2.0, -1.0], [-2.0, -1.0]])  # log W = -.7, -.7, +3
    advantages = np.array([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    w = E(-0.7)
    check(
        lambda lp: losses.topr_loss(lp, behavior, advantages, np.ones((3, 2))),
        logprobs,
        [[-2 * w, -w], [2.0, 1.0], [-2.0, -1.0]],
        [[w, w], [-1.0, -1.0], [1.0, 1.0]],
    )


def test_vespo():
    # W = 2 and 1/2 over two tokens. phi(2) = 4 e^-3 (A>0), 8 e^-2 (A<0); phi(.5) = e^1.5 / 4, e / 8; phi(1) = 1
    half = np.log(2.0) / 2
    logprobs = np.full((5, 2), -1.0)
    behavior = logprobs - np.array([[half], [half], [-half], [-half], [0.0]])
    advantages = np.array([[1.0], [-1.0], [1.0], [-1.0], [-1.0]]) * np.ones((5, 2))
    phi = np.array([[4 * E(-3.0)], [8 * E(-2.0)], [E(1.5) / 4], [E(1.0) / 8], [1.0]]) * np.ones((5, 2))
    check(
        lambda lp: losses.vespo_loss(lp, behavior, advantages, np.ones((5, 2))),
        logprobs, phi * advantages, -phi * advantages, rtol=1e-5,
    )  # fmt: skip


def test_sapo():
    # f(1) = 2/tau and f'(1) = 1; f(2) = 4 sigmoid(1) with d/dlp = 4 s (1 - s) · 2
    s = 1 / (1 + E(-1.0))
    old, advantages = np.full(3, -1.0), np.array([1.0, -1.0, 1.0])
    check(
        lambda lp: losses.sapo_loss(lp, old, advantages),
        old + np.array([0.0, 0.0, np.log(2.0)]),
        [-2.0, 2 / 1.05, -4 * s],
        [-1.0, 1.0, -4 * s * (1 - s) * 2],
    )


def test_mirror_descent_pulls_beyond_the_ratio_clamp():
    # 2·1 + .05·.25; d/dlp = -2 + .1·.5. Then A = 0, 30 nats away: .05·900, pull .1·(-30)
    check(
        lambda lp: losses.mirror_descent_loss(lp, np.array([-1.5, -1.0]), np.array([2.0, 0.0]), tau=0.1),
        [-1.0, -31.0], [2.0125, 45.0], [-1.95, -3.0],
    )  # fmt: skip


def test_asympo_numbers():
    # mean NLLs 2 (over the two trained tokens) and .5
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    logprobs = np.array([[-1.0, -3.0, -50.0], [-0.5, 0.0, 0.0]])
    advantages = np.array([[1.0] * 3, [-1.0] * 3])
    check(
        lambda lp: losses.asympo_loss(lp, advantages, mask),
        logprobs, [[0.5, 1.5, 0.0], [-1.0, 0.0, 0.0]], [[-0.5, -0.5, 0.0], [2.0, 0.0, 0.0]],
    )  # fmt: skip


def test_scaled_policy_loss():
    check(
        lambda lp: losses.scaled_policy_loss(lp, np.array([-2.0, 2.0, 0.0]), negative_scale=0.25),
        [-3.0, -3.0, -3.0], [-1.5, 6.0, 0.0], [0.5, -2.0, 0.0],
    )  # fmt: skip
    with pytest.raises(TypeError, match="negative_scale"):
        losses.scaled_policy_loss(jnp.zeros(1), jnp.zeros(1))


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", E(0.5) - 1.5, 1 - E(0.5)),
        ("k3+", E(0.5) - 1.5, -0.5),
    ],
)
def test_kl_penalty(kind, value, gradient):
    # d = log ref - log pi = .5 and 0
    check(lambda lp: losses.kl_penalty(lp, np.array([-0.5, -2.0]), kind=kind),
          [-1.0, -2.0], [value, 0.0], [gradient, 1.0 if kind == "k1" else 0.0])  # fmt: skip


def test_k3_keeps_its_precision_near_zero():
    value = losses.kl_penalty(jnp.zeros(1), jnp.full(1, 1e-3))
    assert float(value[0]) == pytest.approx(5.00167e-7, rel=1e-3)


def test_entropy_from_logits():
    # p = (1/4, 3/4): H = .562335; dH/dz_i = -p_i (log p_i + H) = ±.205990. An impossible token changes nothing.
    check(losses.entropy_from_logits, [[0.0, 0.0, 0.0, 0.0]], [np.log(4.0)], np.zeros((1, 4)))
    check(losses.entropy_from_logits, [[0.0, np.log(3.0)]], [0.562335], [[0.205990, -0.205990]])
    check(losses.entropy_from_logits, [[-jnp.inf, 1e4, 1e4 + np.log(3.0)]], [0.562335], [[0.0, 0.20599, -0.20599]],
          rtol=1e-3)  # fmt: skip
    check(losses.entropy_from_logits, [[-jnp.inf, 7.0], [-jnp.inf, -jnp.inf]], [0.0, np.log(2.0)], np.zeros((2, 2)))


def test_value_loss():
    returns = np.array([3.0, 3.0, 0.0])
    check(lambda v: losses.value_loss(v, returns), [1.0, 2.0, 2.0], [2.0, 0.5, 2.0], [-2.0, -1.0, 2.0])
    # clip .5 about 1: v=2 counts as 1.5. R=3: (1.5-3)²/2 = 1.125 wins, no gradient. R=0: (2-0)²/2 wins.
    check(
        lambda v: losses.value_loss(v, returns, np.ones(3), clip=0.5), [1.0, 2.0, 2.0], [2.0, 1.125, 2.0],
        [-2.0, 0.0, 2.0],
    )  # fmt: skip


PER_TOKEN = np.array([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "total", "denominator"),
    [
        ("token_mean", 10.0, 4.0),
        ("seq_mean_token_mean", 2.0 + 4.0, 2.0),  # the empty row does not count
        ("seq_mean_token_sum", 10.0, 2.0),
        ("seq_mean_token_sum_norm", 10.0, 2.0 * 8.0),
        ("token_sum", 10.0, 1.0),
    ],
)
def test_aggregate(mode, total, denominator):
    horizon = 8 if mode.endswith("norm") else None
    pair = losses.aggregate(jnp.array(PER_TOKEN), MASK, mode=mode, horizon=horizon)
    assert (float(pair.sum), float(pair.denominator)) == (total, denominator)
    assert float(pair.mean()) == pytest.approx(total / denominator)


def test_aggregate_takes_global_denominators():
    assert losses.aggregate(PER_TOKEN, MASK, num_tokens=100) == (10.0, 100.0)
    assert losses.aggregate(PER_TOKEN, MASK, mode="seq_mean_token_mean", num_sequences=3) == (6.0, 3.0)
    pair = losses.aggregate(PER_TOKEN, MASK, mode="seq_mean_token_sum_norm", num_sequences=5, horizon=10)
    assert pair == (10.0, 50.0)


def test_weighted_pairs_add_and_empty_ones_have_mean_zero():
    one, none = losses.aggregate(PER_TOKEN, MASK), losses.aggregate(PER_TOKEN, np.zeros_like(MASK))
    assert one + one == (20.0, 8.0)
    assert sum([one, none, one]) == (20.0, 8.0)
    assert none == (0.0, 0.0) and float(none.mean()) == 0.0
    gradient = jax.grad(lambda x: losses.aggregate(x, np.zeros((2, 2))).mean())(jnp.ones((2, 2)))
    np.testing.assert_array_equal(gradient, 0.0)
