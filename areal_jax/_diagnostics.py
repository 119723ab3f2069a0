"""What people log about off-policy data, as `Weighted` (sum, count) pairs that add up. Public in `corrections`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from areal_jax import _arrays
from areal_jax._aggregate import Weighted


def ratio_diagnostics(
    logprobs: ArrayLike,
    other_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> dict[str, Weighted]:
    """How far pi is from the policy that sampled the tokens; r = pi / other, per trained token.

    Returns `Weighted` pairs, to be added over micro-batches and then given to `summarize`:

    * `ratio_mean`, `ratio_second_moment`: means of r and r² (`summarize` makes the effective sample size of them)
    * `k1_kl`, `k3_kl`: means of -log r and of r - 1 - log r, both estimates of KL(other || pi)
    * `chi_square`: mean of r² - 1, an estimate of the chi-square divergence of pi from other
    * `sequence_ratio_max`: mean over sequences of the largest r in each (a true maximum does not add up: `max_ratio`)
    * `sequence_chi_square`: mean over sequences of (prod_t r)² - 1
    """
    logprobs, other_logprobs, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, logprobs=logprobs, other_logprobs=other_logprobs
    )
    logprobs = jax.lax.stop_gradient(logprobs)
    log_ratio = _arrays.log_ratio(logprobs, other_logprobs)
    ratio = jnp.where(mask, jnp.exp(log_ratio), 0.0)
    lengths = _arrays.sequence_reduce(mask.astype(jnp.int32), segment_ids, num_segments)
    wide = _arrays.log_ratio(logprobs, other_logprobs, _arrays.WIDE_LOG_RATIO)
    sequence = _arrays.sequence_reduce(wide, segment_ids, num_segments)
    sequence = jnp.clip(sequence, -_arrays.MAX_LOG_RATIO, _arrays.MAX_LOG_RATIO)
    largest = _arrays.sequence_reduce(ratio, segment_ids, num_segments, largest=True)
    return {
        "ratio_mean": _mean(ratio, mask),
        "ratio_second_moment": _mean(jnp.square(ratio), mask),
        "k1_kl": _mean(-log_ratio, mask),
        "k3_kl": _mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "chi_square": _mean(jnp.expm1(2.0 * log_ratio), mask),
        "sequence_ratio_max": _mean(largest, lengths > 0),
        "sequence_chi_square": _mean(jnp.expm1(2.0 * sequence), lengths > 0),
    }


def max_ratio(logprobs: ArrayLike, other_logprobs: ArrayLike, mask: ArrayLike) -> jax.Array:
    """The largest pi / other of all trained tokens, a scalar (0 without any). Combine micro-batches by maximum."""
    logprobs, other_logprobs, mask = _arrays.inputs(
        mask, need_mask=True, logprobs=logprobs, other_logprobs=other_logprobs
    )
    ratio = jnp.exp(_arrays.log_ratio(jax.lax.stop_gradient(logprobs), other_logprobs))
    return jnp.max(jnp.where(mask, ratio, 0.0), initial=0.0)


def mismatch_statistics(train_logprobs: ArrayLike, sampler_logprobs: ArrayLike, mask: ArrayLike) -> dict[str, Weighted]:
    """How well trainer and sampler agree on tokens of lag 0; both should be numerically the same policy.

    * `logprob_difference` (trainer - sampler), `logprob_abs_difference`, `logprob_square_difference`, in nats
    * `probability_difference`, `probability_abs_difference`
    * `ratio_mean`, `ratio_second_moment`, `k1_kl`, `k3_kl` as in `ratio_diagnostics`, of trainer / sampler
    * the moments from which `summarize` makes `probability_correlation` (verl's `rollout_actor_probs_pearson_corr`):
      `train_probability` p, `sampler_probability` q, their `_complement`s 1 - p and 1 - q, and the products
      `train_product` p (1 - p), `sampler_product` q (1 - q), `cross_product` p (1 - q)
    """
    train, sampler, mask = _arrays.inputs(
        mask, need_mask=True, train_logprobs=train_logprobs, sampler_logprobs=sampler_logprobs
    )
    train = jax.lax.stop_gradient(train)
    difference = _arrays.log_ratio(train, sampler)
    p, q, ratio = jnp.exp(train), jnp.exp(sampler), jnp.exp(difference)
    not_p, not_q = -jnp.expm1(train), -jnp.expm1(sampler)
    return {
        "logprob_difference": _mean(difference, mask),
        "logprob_abs_difference": _mean(jnp.abs(difference), mask),
        "logprob_square_difference": _mean(jnp.square(difference), mask),
        "probability_difference": _mean(p - q, mask),
        "probability_abs_difference": _mean(jnp.abs(p - q), mask),
        "ratio_mean": _mean(ratio, mask),
        "ratio_second_moment": _mean(jnp.square(ratio), mask),
        "k1_kl": _mean(-difference, mask),
        "k3_kl": _mean(jnp.expm1(difference) - difference, mask),
        "train_probability": _mean(p, mask),
        "sampler_probability": _mean(q, mask),
        "train_complement": _mean(not_p, mask),
        "sampler_complement": _mean(not_q, mask),
        "train_product": _mean(p * not_p, mask),
        "sampler_product": _mean(q * not_q, mask),
        "cross_product": _mean(p * not_q, mask),
    }


def masked_fraction(keep: ArrayLike, mask: ArrayLike) -> Weighted:
    """The fraction of the trained tokens (`mask`) that a correction dropped (`keep` is False, or a weight of 0)."""
    mask, keep = jnp.asarray(mask), jnp.asarray(keep)
    _arrays.check_shape("keep", keep, mask.shape, "mask")
    mask = mask.astype(bool)
    return _mean(~keep.astype(bool), mask)


def clip_fractions(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    per_sequence: bool = False,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> tuple[Weighted, Weighted]:
    """The fractions of trained tokens that PPO's clip holds: A < 0, r < 1 - clip_low, and A > 0, r > 1 + clip_high.

    Args:
      clip_low, clip_high: the loss's.
      per_sequence: r is GSPO's, the geometric mean over the token's sequence; else the token's own.
    """
    logprobs, old_logprobs, advantages, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    log_ratio = _arrays.log_ratio(jax.lax.stop_gradient(logprobs), old_logprobs, _arrays.WIDE_LOG_RATIO)
    if per_sequence:
        log_ratio = _arrays.sequence_mean(log_ratio, mask, segment_ids, num_segments)
    ratio = jnp.exp(jnp.clip(log_ratio, -_arrays.MAX_LOG_RATIO, _arrays.MAX_LOG_RATIO))
    low = (advantages < 0) & (ratio < 1.0 - clip_low)
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    return _mean(low, mask), _mean(high, mask)


def nll_balance(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    min_nll: float = 1e-3,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> dict[str, Weighted]:
    """What to watch under losses that use the current policy only (naive, SPO, ASymPO), where the value says little.

    Per response, with nll its mean token NLL and A its mean advantage:

    * `positive_mass`, `negative_mass`: means over responses of max(A, 0) nll and max(-A, 0) nll. They start about
      equal; a ratio negative / positive that grows means that pushing down dominates
    * `positive_nll`, `negative_nll`: mean nll of responses with A > 0 and with A < 0
    * `floor_fraction`: responses whose nll is below `min_nll`, where ASymPO's floor acts
    """
    logprobs, advantages, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, logprobs=logprobs, advantages=advantages
    )
    lengths = _arrays.sequence_reduce(mask.astype(jnp.int32), segment_ids, num_segments)
    there = lengths > 0
    divisor = jnp.maximum(lengths, 1).astype(jnp.float32)
    nll = _arrays.sequence_reduce(-jax.lax.stop_gradient(logprobs), segment_ids, num_segments) / divisor
    mean_advantage = _arrays.sequence_reduce(advantages, segment_ids, num_segments) / divisor
    return {
        "positive_mass": _mean(jnp.maximum(mean_advantage, 0.0) * nll, there),
        "negative_mass": _mean(jnp.maximum(-mean_advantage, 0.0) * nll, there),
        "positive_nll": _mean(nll, there & (mean_advantage > 0)),
        "negative_nll": _mean(nll, there & (mean_advantage < 0)),
        "floor_fraction": _mean(nll < min_nll, there),
    }


def summarize(diagnostics: Mapping[str, Weighted]) -> dict[str, jax.Array]:
    """Divides every pair, and adds what only exists after all micro-batches have been added up:

    * `effective_sample_size`: (mean r)² / mean r², as a fraction of the tokens, where both moments are present
    * `ratio_std`, from `ratio_diagnostics`
    * `logprob_difference_std` and `probability_correlation`, from `mismatch_statistics`

    Variances are made of moments that are small where they are small: float32 would not tell E[r²] from E[r]² where all
    ratios are near 1, nor E[p²] from E[p]² where a policy is sure of nearly every token.
    """
    means = {name: pair.mean() for name, pair in diagnostics.items()}
    if "ratio_mean" in means and "ratio_second_moment" in means:
        square = jnp.square(means["ratio_mean"])
        means["effective_sample_size"] = _divide(square, means["ratio_second_moment"])
    if "chi_square" in means:
        above = means["k3_kl"] - means["k1_kl"]  # the mean of r - 1
        means["ratio_std"] = jnp.sqrt(jnp.maximum(means["chi_square"] - above * (2.0 + above), 0.0))
    if "logprob_square_difference" in means:
        variance = means["logprob_square_difference"] - jnp.square(means["logprob_difference"])
        means["logprob_difference_std"] = jnp.sqrt(jnp.maximum(variance, 0.0))
    if "cross_product" in means:
        p, q = means["train_probability"], means["sampler_probability"]
        p_variance = jnp.maximum(p * means["train_complement"] - means["train_product"], 0.0)
        q_variance = jnp.maximum(q * means["sampler_complement"] - means["sampler_product"], 0.0)
        covariance = p * means["sampler_complement"] - means["cross_product"]
        correlation = _divide(covariance, jnp.sqrt(p_variance) * jnp.sqrt(q_variance))
        means["probability_correlation"] = jnp.clip(correlation, -1.0, 1.0)
    return means


def _mean(values: jax.Array, mask: jax.Array) -> Weighted:
    total = jnp.where(mask, values.astype(jnp.float32), 0.0).sum()
    return Weighted(total, mask.sum(dtype=jnp.int32).astype(jnp.float32))


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)
