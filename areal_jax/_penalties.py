"""What is added to a policy loss: a pull to a reference, an entropy bonus, the critic's loss. Public in `losses`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from areal_jax import _arrays

KL_KINDS = ("k1", "k2", "k3", "k3+")


def kl_penalty(
    logprobs: ArrayLike, ref_logprobs: ArrayLike, mask: ArrayLike | None = None, *, kind: str = "k3"
) -> jax.Array:
    """Estimates KL(pi || pi_ref) at tokens sampled from pi; with d = log pi_ref - log pi:

    * "k1": -d. Unbiased as a value (a penalty in the reward); as a loss its expected gradient is 0 (arXiv 2512.21852).
    * "k2": d² / 2. Its gradient as a loss is unbiased on-policy.
    * "k3" (default; GRPO, arXiv 2402.03300): exp(d) - d - 1. Unbiased, never negative; a biased gradient.
    * "k3+": k3's value with k2's gradient (verl's name).

    d is clamped to ±20, without a gradient beyond; the result is not clamped (verl clamps k3 to ±10).
    """
    _arrays.check_choice("kind", kind, KL_KINDS)
    logprobs, ref_logprobs, _ = _arrays.inputs(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = -_arrays.log_ratio(logprobs, ref_logprobs)
    if kind == "k1":
        return -d
    k2 = 0.5 * jnp.square(d)
    if kind == "k2":
        return k2
    k3 = jnp.expm1(d) - d
    return k3 if kind == "k3" else jax.lax.stop_gradient(k3) + (k2 - jax.lax.stop_gradient(k2))


def entropy_from_logits(logits: ArrayLike) -> jax.Array:
    """Entropy in nats of softmax(logits): [..., V] -> [...], float32. Logits of -inf are impossible tokens."""
    logits = jnp.asarray(logits)
    if logits.ndim == 0:
        raise ValueError("logits is a scalar, expected an array [..., V]")
    logits = jnp.maximum(logits.astype(jnp.float32), -1e30)  # 0 · (-inf) would be NaN
    logits = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)


def value_loss(
    values: ArrayLike,
    returns: ArrayLike,
    old_values: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    clip: float | None = None,
) -> jax.Array:
    """The critic's loss: (v - R)² / 2, or with `clip` PPO's max of it and of (clip(v, v_old ± clip) - R)² / 2.

    Args:
      values: [..., T], differentiated. returns, old_values: [..., T], constants.
      clip: the largest trusted change of a value. Default none; PPO-for-LLM codes use 0.2 to 0.5. Needs `old_values`.
    """
    if clip is not None and old_values is None:
        raise ValueError("clip is given without old_values, the values that the clip is centred on")
    values, returns, old_values, _ = _arrays.inputs(mask, values=values, returns=returns, old_values=old_values)
    loss = jnp.square(values - returns)
    if clip is not None:
        loss = jnp.maximum(loss, jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns))
    return 0.5 * loss
