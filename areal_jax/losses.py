"""Policy-gradient objectives for stale, asynchronous LLM data, as pure functions of arrays.

One function per algorithm. None of them knows a model, a config or a registry, and none reduces: each takes per-token
arrays [..., T] and returns an unreduced float32 array [..., T], to be minimised. `aggregate` reduces, once.

The conventions, which no docstring below repeats:

* Positional order: current log-probs (the only argument with a gradient), the other policy's log-probs (proximal before
  behaviour), advantages, mask. Everything else is keyword-only.
* All of these have the same shape [..., T], in any float dtype; float32 inside. Advantages are per token: broadcast
  a per-sequence advantage first. Advantages, weights and the other policy's log-probs are constants (stop_gradient).
* `mask` (bool or 0/1) marks the trained tokens. The loss is 0 elsewhere, and what the arrays hold there (-inf, NaN,
  huge values) reaches neither a value nor a gradient. A log-prob at a trained place should be finite. A mask smaller
  than the one given to `aggregate` drops tokens without changing the denominator.
* `old_logprobs` anchor a trust region: the proximal policy, or the behaviour policy where nothing is decoupled.
* Log-ratios are clamped to ±20 before exp, as in verl; there is no gradient beyond.
* Functions that look at whole sequences take one sequence per row, or packed rows with `segment_ids` (0 = padding,
  sequences numbered 1..num_segments in each row) and a static `num_segments`; the answer is the same.
* Wrong shapes, a missing `num_segments`, an unknown choice: ValueError when traced, naming the argument.

`docs/objectives.md` helps to choose, and gives each objective's name in verl, TRL, Tunix and AReaL.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from areal_jax import _arrays
from areal_jax._aggregate import Weighted, aggregate
from areal_jax._penalties import entropy_from_logits, kl_penalty, value_loss

__all__ = [
    "Weighted",
    "aggregate",
    "aipo_loss",
    "asympo_loss",
    "cispo_loss",
    "decoupled_ppo_loss",
    "entropy_from_logits",
    "gspo_loss",
    "importance_log_ratio",
    "kl_penalty",
    "mirror_descent_loss",
    "ppo_clip_loss",
    "reinforce_loss",
    "sapo_loss",
    "scaled_policy_loss",
    "topr_loss",
    "value_loss",
    "vespo_loss",
]

CAP_MODES = ("mask", "clamp")


def importance_log_ratio(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    max_log_ratio: float = _arrays.MAX_LOG_RATIO,
) -> jax.Array:
    """log(pi / pi_old) per token, within ±max_log_ratio; 0 at masked places and where both probabilities are 0.

    Args:
      max_log_ratio: the clamp, 20 as in verl. There is no gradient beyond it.
    """
    logprobs, old_logprobs, _ = _arrays.inputs(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    return _arrays.log_ratio(logprobs, old_logprobs, max_log_ratio)


def ppo_clip_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """PPO's clipped surrogate: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = pi / pi_old.

    Args:
      clip_low, clip_high: 0.2 and 0.2 (PPO, arXiv 1707.06347); DAPO's clip-higher (arXiv 2503.14476) is 0.2 and 0.28.
      dual_clip: c > 1 bounds the loss of tokens with A < 0 by -c A (arXiv 1912.09729, where c = 3). Default: no bound.
    """
    logprobs, old_logprobs, advantages, _ = _arrays.inputs(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = jnp.exp(_arrays.log_ratio(logprobs, old_logprobs))
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)


def decoupled_ppo_loss(
    logprobs: ArrayLike,
    proximal_logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weight_cap: float | None = None,
    cap_mode: str = "mask",
) -> jax.Array:
    """AReaL's objective: PPO's surrogate around pi_prox, times the detached weight w = pi_prox / pi_behav.

    w · max(-A u, -A clip(u, 1 - clip_low, 1 + clip_high)), u = pi / pi_prox (arXiv 2505.24298 Eq. 5, after Hilton et
    al., arXiv 2110.00641). The weight is always applied; with pi_prox = pi_behav this is `ppo_clip_loss`.

    Args:
      proximal_logprobs: of the parameters as they were before this training step (recomputed, or interpolated by
        `corrections.interpolate_proximal_logprobs`).
      behavior_logprobs: of whatever sampled each token, as stored by the inference engine.
      clip_low, clip_high, dual_clip: as in `ppo_clip_loss`; the paper has 0.2, 0.2 and none.
      weight_cap: the largest weight. Default none, as in the paper; AReaL's released recipes use 5 with "mask".
      cap_mode: "mask" gives a token whose weight is above the cap no loss (and aggregate's denominator should stay the
        full mask's, as in AReaL); "clamp" lowers its weight to the cap.
    """
    _arrays.check_choice("cap_mode", cap_mode, CAP_MODES)
    logprobs, proximal_logprobs, behavior_logprobs, advantages, _ = _arrays.inputs(
        mask,
        logprobs=logprobs,
        proximal_logprobs=proximal_logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
    )
    weights = jnp.exp(_arrays.log_ratio(proximal_logprobs, behavior_logprobs))
    if weight_cap is not None:
        capped = jnp.zeros_like(weights) if cap_mode == "mask" else jnp.full_like(weights, weight_cap)
        weights = jnp.where(weights > weight_cap, capped, weights)
    ratio = jnp.exp(_arrays.log_ratio(logprobs, proximal_logprobs))
    return weights * _clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)


def reinforce_loss(
    logprobs: ArrayLike, advantages: ArrayLike, mask: ArrayLike | None = None, *, weights: ArrayLike | None = None
) -> jax.Array:
    """REINFORCE with detached weights: -w A log pi. Without weights it is the naive loss on stale data (also: GPG).

    Args:
      weights: [..., T], constants, e.g. from `corrections.tis_weights`. Default 1. With w = pi / pi_behav the gradient
        is that of unclipped importance sampling, -A pi / pi_behav.
    """
    logprobs, advantages, weights, _ = _arrays.inputs(mask, logprobs=logprobs, advantages=advantages, weights=weights)
    loss = -advantages * logprobs
    return loss if weights is None else weights * loss


def cispo_loss(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    ratio_min: float = 0.0,
    ratio_max: float = 5.0,
) -> jax.Array:
    """CISPO: -sg(clip(pi / pi_behav, ratio_min, ratio_max)) A log pi. Every token keeps a gradient (arXiv 2506.13585).

    Args:
      ratio_min, ratio_max: bounds on the ratio itself, not distances from 1. The paper has no lower bound and tunes the
        upper; 5 is ScaleRL's value (arXiv 2510.13786) and what TRL calls `epsilon_high=5`. verl's `clip_ratio_low` and
        `clip_ratio_high` are 1 - ratio_min and ratio_max - 1.
    """
    logprobs, behavior_logprobs, advantages, _ = _arrays.inputs(
        mask, logprobs=logprobs, behavior_logprobs=behavior_logprobs, advantages=advantages
    )
    ratio = jnp.exp(_arrays.log_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs))
    return -jnp.clip(ratio, ratio_min, ratio_max) * advantages * logprobs


def aipo_loss(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    ratio_max: float,
) -> jax.Array:
    """AIPO (LlamaRL, arXiv 2505.24034): -sg(min(pi / pi_behav, ratio_max)) A log pi; CISPO without a lower bound.

    Args:
      ratio_max: required; reported settings are 2 to 10.
    """
    return cispo_loss(logprobs, behavior_logprobs, advantages, mask, ratio_min=0.0, ratio_max=ratio_max)


def gspo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """GSPO: PPO's surrogate on the length-normalised sequence ratio s = exp(mean_t log(pi / pi_old)).

    max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)) at every token (arXiv 2507.18071). The gradient is the true one,
    through the mean; with one advantage per sequence it equals GSPO-token's straight-through form (verl, Tunix) under
    every aggregation mode. With advantages that differ inside a sequence, GSPO-token gives each token its own and this
    function gives each token their mean. Use `seq_mean_token_mean`, as the paper does.

    Args:
      clip_low, clip_high: 3e-4 and 4e-4, the paper's. They are this small because s is a geometric mean.
    """
    logprobs, old_logprobs, advantages, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    log_ratio = _arrays.log_ratio(logprobs, old_logprobs, _arrays.WIDE_LOG_RATIO)
    mean = _arrays.sequence_mean(log_ratio, mask, segment_ids, num_segments)
    ratio = jnp.exp(jnp.clip(mean, -_arrays.MAX_LOG_RATIO, _arrays.MAX_LOG_RATIO))
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, None)


def topr_loss(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """TOPR: -w A log pi with w = 1 where A >= 0, else min(W, 1), W = prod_t pi / pi_behav over the whole sequence.

    Bad responses lose influence as the policy leaves them; good ones are imitated at full weight (arXiv 2503.14286,
    with its canonical truncation [0, 1]). The weight is the trajectory's and is detached. The partition is by the sign
    of the advantage, which is the paper's reward for rewards centred at 0.
    """
    logprobs, behavior_logprobs, advantages, _ = _arrays.inputs(
        mask,
        segment_ids,
        num_segments,
        True,
        logprobs=logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
    )
    weights = jnp.exp(jnp.minimum(_sequence_log_ratio(logprobs, behavior_logprobs, segment_ids, num_segments), 0.0))
    return -jnp.where(advantages < 0, weights, 1.0) * advantages * logprobs


def vespo_loss(
    logprobs: ArrayLike,
    behavior_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """VESPO: -phi(W) A log pi with phi(W) = W^k exp(lambda (1 - W)), detached, W = prod_t pi / pi_behav.

    A soft, sequence-level replacement of clipping; phi(1) = 1 (arXiv 2602.10693).

    Args:
      k_pos, lambda_pos: for A >= 0: 2 and 3, as in the authors' code and TRL (their docstrings hold older numbers).
      k_neg, lambda_neg: for A < 0: 3 and 2.
    """
    logprobs, behavior_logprobs, advantages, _ = _arrays.inputs(
        mask,
        segment_ids,
        num_segments,
        True,
        logprobs=logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
    )
    log_weight = _sequence_log_ratio(logprobs, behavior_logprobs, segment_ids, num_segments)
    good = advantages >= 0
    k, rate = jnp.where(good, k_pos, k_neg), jnp.where(good, lambda_pos, lambda_neg)
    return -jnp.exp(rate + k * log_weight - rate * jnp.exp(log_weight)) * advantages * logprobs


def sapo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> jax.Array:
    """SAPO: -A f(r), f(r) = (4 / tau) sigmoid(tau (r - 1)): a soft gate in place of PPO's clip (arXiv 2511.20347).

    f'(1) = 1, so on-policy the gradient is REINFORCE's; the value there is -2 A / tau.

    Args:
      tau_pos, tau_neg: 1.0 where A > 0 and 1.05 elsewhere, the paper's: negative tokens fade a little sooner.
    """
    logprobs, old_logprobs, advantages, _ = _arrays.inputs(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    ratio = jnp.exp(_arrays.log_ratio(logprobs, old_logprobs))
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    return -advantages * jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau


def mirror_descent_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    tau: float,
) -> jax.Array:
    """Token-level mirror descent: -A log pi + (tau / 2) log(pi / pi_old)^2, a squared pull instead of a ratio.

    The token form of Kimi k1.5 (arXiv 2501.12599), whose square is of the whole sequence's log-ratio; the same as
    verl's `dro` up to a constant. The log-ratio is not clamped at 20 here: the pull must hold however far pi went.

    Args:
      tau: required; ROLL uses 0.1.
    """
    logprobs, old_logprobs, advantages, _ = _arrays.inputs(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    log_ratio = _arrays.log_ratio(logprobs, old_logprobs, _arrays.WIDE_LOG_RATIO)
    return -advantages * logprobs + 0.5 * tau * jnp.square(log_ratio)


def asympo_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    min_nll: float = 1e-3,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """ASymPO: -A log pi / sg(the response's current average token NLL). Needs no behaviour log-probs. Experimental.

    From arXiv 2606.03070. The paper's words: it "normalizes each response's token loss by its current average token
    negative log-probability", "requires no behavior-policy probabilities, restores response-level zero-sum balance, and
    preserves a nonzero learning signal". Derived here, for want of readable equations and of any published code: that
    the normaliser is detached (otherwise there is no gradient at all), the floor, and the aggregation. Proven in our
    tests, with `aggregate(mode="seq_mean_token_mean")` over G responses:

    * the value is mean(A): 0 over complete groups whose advantages sum to 0, so it says nothing about progress (log
      `corrections.nll_balance` instead);
    * the gradient is that of mean(A log nll_bar): -A / (G sum_t nll_t) per token. Length cancels;
    * in logits, the gradients of a response's tokens have norms that sum to at most sqrt(2) |A| / G.

    All three need the sequence mean; other modes, dropped group members, and responses at the floor break the first.
    Steps are larger than GRPO's by 1 / nll_bar (2 to 10 times, growing as entropy falls): tune the learning rate anew.

    Args:
      min_nll: floor of the normaliser, in nats; 1e-3, ours. Responses below it are nearly deterministic.
    """
    logprobs, advantages, mask = _arrays.inputs(
        mask, segment_ids, num_segments, True, logprobs=logprobs, advantages=advantages
    )
    nll = _arrays.sequence_mean(-jax.lax.stop_gradient(logprobs), mask, segment_ids, num_segments)
    return -advantages * logprobs / jnp.maximum(nll, min_nll)


def scaled_policy_loss(
    logprobs: ArrayLike, advantages: ArrayLike, mask: ArrayLike | None = None, *, negative_scale: float
) -> jax.Array:
    """SPO of arXiv 2606.03070: -C A log pi, C = 1 where A >= 0 and negative_scale elsewhere. Experimental.

    The paper's words: "reduces the influence of negative-advantage responses with a fixed coefficient". The formula is
    derived from them. Three other methods are also called SPO (Simple, Segment, Single-stream Policy Optimization).

    Args:
      negative_scale: required, in (0, 1): the paper's value is not public. 1 is the naive loss, 0 learns from the good
        responses only.
    """
    logprobs, advantages, _ = _arrays.inputs(mask, logprobs=logprobs, advantages=advantages)
    return -jnp.where(advantages < 0, negative_scale, 1.0) * advantages * logprobs


def _clipped_surrogate(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, dual_clip: float | None
) -> jax.Array:
    if isinstance(dual_clip, (int, float)) and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1 (None switches it off)")
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)


def _sequence_log_ratio(
    logprobs: jax.Array, other: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None
) -> jax.Array:
    """log prod_t pi / other of the token's own sequence, detached, clamped to ±20 after the sum."""
    log_ratio = _arrays.log_ratio(jax.lax.stop_gradient(logprobs), other, _arrays.WIDE_LOG_RATIO)
    total = _arrays.sequence_total(log_ratio, segment_ids, num_segments)
    return jnp.clip(total, -_arrays.MAX_LOG_RATIO, _arrays.MAX_LOG_RATIO)
