"""Corrections for data that another policy sampled: weights and masks to give to `losses`, and what to log about them.

Two gaps exist, and one function may serve either: the sampler computes other log-probs than the trainer for the same
parameters (another kernel, another precision), and the parameters have moved on since (staleness). Weights multiply a
loss or go into `reinforce_loss(weights=)`; masks go into a loss as its `mask`, while `aggregate` keeps the full one.

The conventions are those of `losses`: per-token arrays [..., T] of one shape, any float dtype in, float32 or bool out,
float32 inside, log-ratios clamped to ±20, packed rows by `segment_ids` and a static `num_segments`, ValueErrors at
trace time. Everything here is detached: no gradient flows through a weight, a mask or a diagnostic. Weights are 0 and
masks False at masked places, whatever the arrays hold there.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from areal_jax import _arrays
from areal_jax._aggregate import Weighted
from areal_jax._diagnostics import (
    clip_fractions,
    masked_fraction,
    max_ratio,
    mismatch_statistics,
    nll_balance,
    ratio_diagnostics,
    summarize,
)

__all__ = [
    "Weighted",
    "clip_fractions",
    "dppo_mask",
    "icepop_weights",
    "interpolate_proximal_logprobs",
    "m2po_all_tokens_mask",
    "m2po_mask",
    "masked_fraction",
    "max_ratio",
    "mismatch_statistics",
    "nll_balance",
    "opsm_mask",
    "ratio_diagnostics",
    "sequence_is_mask",
    "summarize",
    "tis_weights",
]

SEQUENCE_KINDS = ("geometric", "arithmetic", "product")
INTERPOLATIONS = ("loglinear", "linear")


def tis_weights(
    train_old: ArrayLike, sampler: ArrayLike, mask: ArrayLike | None = None, *, cap: float = 2.0
) -> jax.Array:
    """Truncated importance weights min(pi_train / pi_sampler, cap), per token: all tokens stay, none counts double.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (read through its
    implementations).

    Args:
      train_old: the trainer's log-probs of the tokens under the parameters that sampled them (or, against staleness,
        under the proximal ones).
      sampler: the log-probs that the inference engine reported.
      cap: 2, as in slime, open-instruct and verl.
    """
    return jnp.minimum(_weights(train_old, sampler, mask), cap)


def icepop_weights(
    train_old: ArrayLike, sampler: ArrayLike, mask: ArrayLike | None = None, *, low: float = 0.5, high: float = 5.0
) -> jax.Array:
    """IcePop: pi_train / pi_sampler where it lies in [low, high], else 0 (arXiv 2510.18855; its bounds, 0.5 and 5)."""
    weights = _weights(train_old, sampler, mask)
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def sequence_is_mask(
    train_old: ArrayLike,
    sampler: ArrayLike,
    mask: ArrayLike,
    *,
    low: float,
    high: float,
    kind: str = "geometric",
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """Keeps whole sequences whose importance ratio lies in [low, high]; bool [..., T], already combined with `mask`.

    Args:
      low, high: required; they bound the ratio pi_train / pi_sampler itself. (verl's `*_k1` rejection modes bound its
        inverse.) Published geometric bounds are close to 1: 0.999 to 1.001 in verl, 0.999 to 1.002 in NeMo-RL.
      kind: "geometric", exp(mean_t log r), forgets length; "arithmetic", mean_t r, sees single spikes; "product",
        prod_t r, is the exact ratio of the sequence (verl's and TRL's masked importance sampling).
    """
    _arrays.check_choice("kind", kind, SEQUENCE_KINDS)
    train_old, sampler, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, train_old=train_old, sampler=sampler
    )
    bound = _arrays.MAX_LOG_RATIO
    log_ratio = jax.lax.stop_gradient(_arrays.log_ratio(train_old, sampler, _arrays.WIDE_LOG_RATIO))
    if kind == "product":
        ratio = jnp.exp(jnp.clip(_arrays.sequence_total(log_ratio, segment_ids, num_segments), -bound, bound))
    elif kind == "geometric":
        ratio = jnp.exp(jnp.clip(_arrays.sequence_mean(log_ratio, mask, segment_ids, num_segments), -bound, bound))
    else:
        ratio = jnp.where(mask, jnp.exp(jnp.clip(log_ratio, -bound, bound)), 0.0)
        ratio = _arrays.sequence_mean(ratio, mask, segment_ids, num_segments)
    return mask & (ratio >= low) & (ratio <= high)


def opsm_mask(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    delta: float,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """Off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556 Eq. 9): drops bad responses that pi has left.

    A token is dropped where A < 0 and mean_t(log pi_behav - log pi) of its sequence is above `delta`.

    Args:
      delta: required, in nats per token; TRL's documentation suggests 0.5, slime's default is 1e-4.
    """
    logprobs, behavior_logprobs, advantages, mask = _arrays.inputs(
        mask,
        segment_ids,
        num_segments,
        True,
        logprobs=logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
    )
    log_ratio = jax.lax.stop_gradient(_arrays.log_ratio(logprobs, behavior_logprobs, _arrays.WIDE_LOG_RATIO))
    distance = -_arrays.sequence_mean(log_ratio, mask, segment_ids, num_segments)
    return mask & ~((advantages < 0) & (distance > delta))


def dppo_mask(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
) -> jax.Array:
    """DPPO-TV (arXiv 2602.04879): trusts by the difference of probabilities, which stays small for rare tokens.

    A token is dropped where A > 0 and pi - pi_behav > delta_high, or A < 0 and pi - pi_behav < -delta_low: where the
    step would lead further away.

    Args:
      delta_low, delta_high: 0.2 and 0.2 in probability, as in prime-rl.
    """
    logprobs, behavior_logprobs, advantages, mask = _arrays.inputs(
        mask, logprobs=logprobs, behavior_logprobs=behavior_logprobs, advantages=advantages
    )
    difference = jnp.exp(jax.lax.stop_gradient(logprobs)) - jnp.exp(behavior_logprobs)
    outside = ((advantages > 0) & (difference > delta_high)) | ((advantages < 0) & (difference < -delta_low))
    return ~outside if mask is None else mask & ~outside


def m2po_mask(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    budget: float = 0.04,
    ratio_floor: float = 0.7,
    ratio_ceiling: float = 1.5,
) -> jax.Array:
    """M2PO as in its authors' code (arXiv 2510.01161): a trust region whose width is set by a second-moment budget.

    Only harmful tokens count, those that already moved where their advantage pushes (A > 0 and r > 1, or A < 0 and
    r < 1). In ascending order of (log r)² they are kept as long as capping all the later ones at the same size leaves
    the mean over harmful tokens below `budget`; the others are dropped, unless r is within [ratio_floor,
    ratio_ceiling]. The authors clip at that threshold; dropping gives the same gradient.

    The threshold is one number for all the tokens given (over every axis): call it on the whole batch, not on
    micro-batches.

    Args:
      budget: 0.04, the paper's. ratio_floor, ratio_ceiling: 0.7 and 1.5, never clipped tighter; from the code.
    """
    logprobs, behavior_logprobs, advantages, mask = _arrays.inputs(
        mask, need_mask=True, logprobs=logprobs, behavior_logprobs=behavior_logprobs, advantages=advantages
    )
    log_ratio = _arrays.log_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs)
    harmful = mask & (((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0)))
    squares = jnp.where(harmful, jnp.square(log_ratio), jnp.inf).reshape(-1)
    order = jnp.sort(squares)
    count = harmful.sum(dtype=jnp.int32)
    rank = jnp.arange(order.size, dtype=jnp.int32)
    finite = jnp.where(rank < count, order, 0.0)
    total = budget * count.astype(jnp.float32)
    later = jnp.maximum(count - 1 - rank, 0).astype(jnp.float32)
    fits = (rank < count) & ((jnp.cumsum(finite) + finite * later < total) | (finite.sum() <= total))
    threshold = jnp.max(jnp.where(fits, finite, -1.0), initial=-1.0)
    ratio = jnp.exp(log_ratio)
    inside = (ratio >= ratio_floor) & (ratio <= ratio_ceiling)
    return mask & (~harmful | inside | (jnp.square(log_ratio) <= threshold))


def m2po_all_tokens_mask(
    logprobs: ArrayLike, behavior_logprobs: ArrayLike, mask: ArrayLike, *, budget: float = 0.04
) -> jax.Array:
    """M2PO as in AReaL: drops the tokens with the largest (log r)², whatever their advantage, until the mean is small.

    Over all trained tokens, the largest squares go first, until the mean of those that stay is below `budget`; at least
    one token stays. AReaL gives it the proximal log-probs as `logprobs`. Like `m2po_mask` it needs the whole batch.

    Args:
      budget: 0.04 (arXiv 2510.01161 and AReaL's recipes).
    """
    logprobs, behavior_logprobs, mask = _arrays.inputs(
        mask, need_mask=True, logprobs=logprobs, behavior_logprobs=behavior_logprobs
    )
    squares = jnp.square(_arrays.log_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs))
    order = jnp.argsort(jnp.where(mask, squares, jnp.inf).reshape(-1))
    rank = jnp.arange(order.size, dtype=jnp.int32)
    means = jnp.cumsum(squares.reshape(-1)[order]) / (rank + 1).astype(jnp.float32)
    fits = (rank < mask.sum(dtype=jnp.int32)) & ((means < budget) | (rank == 0))
    # Means of ascending numbers ascend, so the tokens that fit are the smallest ones.
    return mask & jnp.zeros(order.shape, bool).at[order].set(fits).reshape(mask.shape)


def interpolate_proximal_logprobs(
    behavior: ArrayLike,
    current: ArrayLike,
    behavior_version: ArrayLike,
    current_version: ArrayLike,
    *,
    method: str = "loglinear",
) -> jax.Array:
    """The proximal policy's log-probs without a forward pass (A-3PO, arXiv 2512.06547; as in AReaL's code).

    The proximal policy is taken to be one version before `current`, on the way from each token's behaviour policy: with
    d = current_version - behavior_version, alpha = (d - 1) / d for d >= 1. Where d < 1, or the token was not sampled
    (behavior_version < 0: prompts), alpha = 0 and the result is `behavior`.

    A trainer that is computing version v + 1 from data with proximal policy v passes current_version = v + 1.

    Args:
      behavior, current: [..., T] log-probs; `current` is a constant here too.
      behavior_version: [..., T] int, per token: the version that sampled it, -1 for prompt and tool tokens.
      current_version: int, or a scalar array, or [..., T].
      method: "loglinear", behavior + alpha (current - behavior), the default; or "linear", which mixes probabilities.
    """
    _arrays.check_choice("method", method, INTERPOLATIONS)
    behavior, current, _ = _arrays.inputs(None, behavior=behavior, current=current)
    behavior, current = jax.lax.stop_gradient((behavior, current))
    behavior_version, current_version = jnp.asarray(behavior_version), jnp.asarray(current_version)
    _arrays.check_shape("behavior_version", behavior_version, behavior.shape, "behavior")
    if current_version.ndim:
        _arrays.check_shape("current_version", current_version, behavior.shape, "behavior")
    lag = (current_version.astype(jnp.int32) - behavior_version.astype(jnp.int32)).astype(jnp.float32)
    known = (lag >= 1) & (behavior_version >= 0)
    alpha = jnp.where(known, (lag - 1.0) / jnp.where(known, lag, 1.0), 0.0)
    if method == "linear":
        mixed = jnp.logaddexp(jnp.log1p(-alpha) + behavior, jnp.log(alpha) + current)
    else:
        mixed = behavior + alpha * _arrays.log_ratio(current, behavior, _arrays.WIDE_LOG_RATIO)
    return jnp.where(alpha > 0, mixed, behavior)


def _weights(train_old: ArrayLike, sampler: ArrayLike, mask: ArrayLike | None) -> jax.Array:
    train_old, sampler, mask = _arrays.inputs(mask, train_old=train_old, sampler=sampler)
    weights = jnp.exp(_arrays.log_ratio(jax.lax.stop_gradient(train_old), sampler))
    return weights if mask is None else jnp.where(mask, weights, 0.0)
