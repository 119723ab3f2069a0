"""ASymPO and SPO: no other implementation exists to compare with, so what is claimed of them is proven here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import advantages, losses

GROUP, LENGTH, VOCAB = 4, 7, 11
LENGTHS = np.array([7, 3, 1, 5, 6, 2, 7, 4])  # two complete groups
MASK = np.arange(LENGTH) < LENGTHS[:, None]


def zero_sum_advantages(seed=0):
    rewards = np.random.default_rng(seed).integers(0, 2, 8).astype(np.float32)
    rewards[:4], rewards[4:6] = [1, 0, 0, 1], [1, 0]
    per_sequence = advantages.group_relative(rewards, np.repeat([0, 1], GROUP), num_groups=2)
    return jnp.broadcast_to(per_sequence[:, None], MASK.shape)


def logits_and_tokens(seed, scale):
    rng = np.random.default_rng(seed)
    return jnp.array(rng.normal(0, scale, (8, LENGTH, VOCAB)), jnp.float32), rng.integers(0, VOCAB, (8, LENGTH, 1))


def chosen(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, axis=-1)[..., 0]


def objective(logprobs, adv, mask=MASK, mode="seq_mean_token_mean", **keywords):
    return losses.aggregate(losses.asympo_loss(logprobs, adv, mask, **keywords), mask, mode=mode).mean()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_value_is_zero_on_complete_zero_sum_groups(scale):
    adv = zero_sum_advantages()
    logprobs = chosen(*logits_and_tokens(1, scale))
    assert abs(float(objective(logprobs, adv))) < 1e-6
    # the claim needs complete groups, the sequence mean, and advantages that sum to zero
    incomplete = MASK.copy()
    incomplete[0] = False
    assert abs(float(objective(logprobs, adv, incomplete))) > 0.05
    assert abs(float(objective(logprobs, adv, mode="token_mean"))) > 0.01
    assert float(objective(logprobs, adv + 0.5)) == pytest.approx(0.5, abs=1e-5)


def test_gradient_is_that_of_advantage_times_log_mean_nll():
    adv, logprobs = zero_sum_advantages(), chosen(*logits_and_tokens(2, 1.0))

    def identity(logprobs):
        nll = jnp.where(MASK, -logprobs, 0).sum(-1) / LENGTHS.astype(np.float32)
        return (adv[:, 0] * jnp.log(nll)).mean()

    gradient = jax.grad(objective)(logprobs, adv)
    np.testing.assert_allclose(gradient, jax.grad(identity)(logprobs), rtol=1e-5, atol=1e-7)
    total = jnp.where(MASK, -logprobs, 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, np.where(MASK, -adv / (8 * total), 0), rtol=1e-5, atol=1e-7)
    assert np.abs(gradient).max() > 1e-3  # without stop_gradient on the normaliser it would vanish


def test_length_cancels():
    """Every token of a response written twice: the gradient of the response as a whole stays what it was."""
    adv, logprobs = zero_sum_advantages(), chosen(*logits_and_tokens(3, 1.0))
    once = jax.grad(objective)(logprobs, adv)
    twice = jax.grad(objective)(
        jnp.concatenate([logprobs] * 2, -1), jnp.concatenate([adv] * 2, -1), np.concatenate([MASK] * 2, -1)
    )
    np.testing.assert_allclose(twice[:, :LENGTH] + twice[:, LENGTH:], once, rtol=1e-5, atol=1e-8)


def test_scaling_a_response_leaves_its_value_and_divides_its_gradient():
    adv, logprobs = zero_sum_advantages(), chosen(*logits_and_tokens(4, 1.0))
    scaled = logprobs.at[2].multiply(3.0)
    for row in range(8):
        a, b = (losses.asympo_loss(x, adv, MASK)[row].sum() for x in (logprobs, scaled))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    before, after = (jax.grad(objective)(x, adv) for x in (logprobs, scaled))
    np.testing.assert_allclose(after[2] * 3, before[2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_logit_gradient_of_every_response_is_bounded(scale):
    logits, tokens = logits_and_tokens(5, scale)
    adv = zero_sum_advantages()
    gradient = jax.grad(lambda z: objective(chosen(z, tokens), adv))(logits)
    per_response = jnp.linalg.norm(gradient, axis=-1).sum(-1)
    assert np.all(per_response <= np.sqrt(2) * np.abs(adv[:, 0]) / 8 * (1 + 1e-5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_certain_tokens_and_empty_rows_are_finite(dtype):
    logprobs = jnp.zeros((2, 3), dtype)
    mask = np.array([[1, 1, 1], [0, 0, 0]])
    value, gradient = jax.value_and_grad(objective)(logprobs, jnp.ones((2, 3), dtype), mask)
    assert float(value) == 0.0
    # at the floor the leaf's gradient is A / (3 · min_nll); the softmax's Jacobian, 1 - p = 0, removes it
    np.testing.assert_allclose(gradient.astype(np.float32), [[-1000 / 3] * 3, [0] * 3], rtol=1e-2)
    lower = jax.grad(lambda lp: objective(lp, jnp.ones((2, 3)), mask, min_nll=0.1))(logprobs)
    np.testing.assert_allclose(lower.astype(np.float32), [[-10 / 3] * 3, [0] * 3], rtol=1e-2)


def test_spo_leaves_a_positive_tilt():
    # sum C A = (1 - scale) · sum of the positive advantages
    adv = zero_sum_advantages()
    for scale in (1.0, 0.5, 0.0):
        gradient = jax.grad(lambda lp, s=scale: losses.scaled_policy_loss(lp, adv, negative_scale=s).sum())(
            jnp.zeros(MASK.shape)
        )
        positive = np.maximum(adv[:, 0], 0).sum()
        np.testing.assert_allclose(-gradient[:, 0].sum(), (1 - scale) * positive, rtol=1e-5, atol=1e-6)
