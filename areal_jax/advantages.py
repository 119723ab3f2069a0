"""Advantage estimators for LLM reinforcement learning, as pure functions of arrays: no model, no config, no rollout.

Group estimators take `rewards` [N], one per response, and `group_ids` [N], the index of the response's prompt in
0..num_groups-1; `num_groups` is a Python int (static under jit). Groups may be ragged, incomplete, interleaved and
empty. Rows with an id outside the range are padding: they count nowhere and get 0, whatever their reward holds.
Token estimators take [..., T] arrays with a mask of the trained tokens; `jax.vmap` covers any further axes.

Results are float32 and differentiable without NaN; `losses` treats advantages as constants. Statistics are over all the
data given: compute advantages on the whole batch, before it is split into micro-batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from areal_jax import _arrays

__all__ = [
    "GAEOutput",
    "asymre",
    "discounted_returns",
    "gae",
    "group_relative",
    "informative_group_mask",
    "leave_one_out",
    "masked_whiten",
    "overlong_penalty",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]

SCALES = ("std", "none")


class GAEOutput(NamedTuple):
    """Both [..., T] float32, 0 at masked places. `returns` are the critic's targets, advantages + values."""

    advantages: jax.Array
    returns: jax.Array


def group_relative(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    *,
    num_groups: int,
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """Rewards relative to their group: (r - mean) / (std + eps) for GRPO, r - mean for Dr. GRPO; [N] -> [N].

    Singletons and groups of equal rewards get exactly 0 (verl gives a singleton its raw reward), also with eps = 0.

    Args:
      scale: "std" (GRPO, arXiv 2402.03300) or "none" (Dr. GRPO, arXiv 2503.20783).
      ddof: 1 divides the variance by n - 1 (verl, TRL, Tunix, NeMo-RL), 0 by n.
      eps: added to the standard deviation; 1e-6 as in verl, TRL has 1e-4.
    """
    _arrays.check_choice("scale", scale, SCALES)
    groups = _Groups(rewards, group_ids, num_groups)
    centred = groups.centred()
    if scale == "none":
        return centred
    variance = groups.sum(jnp.square(centred)) / jnp.maximum(groups.count - ddof, 1.0)
    return _divide(centred, groups.of_row(_safe_sqrt(variance)) + eps)


def leave_one_out(rewards: ArrayLike, group_ids: ArrayLike, *, num_groups: int) -> jax.Array:
    """RLOO (arXiv 2402.14740): r minus the mean of the group's other rewards, n / (n - 1) (r - mean); singletons 0."""
    groups = _Groups(rewards, group_ids, num_groups)
    return groups.centred() * groups.of_row(groups.count / jnp.maximum(groups.count - 1.0, 1.0))


def asymre(rewards: ArrayLike, group_ids: ArrayLike, *, num_groups: int, baseline_shift: float = -0.1) -> jax.Array:
    """AsymRE (arXiv 2506.20520): r - (group mean + baseline_shift).

    A baseline below the behaviour policy's mean leans towards good responses, which keeps off-policy REINFORCE (the
    naive loss on stale data) from collapsing.

    Args:
      baseline_shift: -0.1, the paper's suggestion for rewards in [0, 1].
    """
    groups = _Groups(rewards, group_ids, num_groups)
    return jnp.where(groups.valid, groups.centred() - baseline_shift, 0.0)


def reinforce_plus_plus(
    rewards: ArrayLike, mask: ArrayLike, *, discount: float = 1.0, segment_ids: ArrayLike | None = None
) -> jax.Array:
    """REINFORCE++ (arXiv 2501.03262): discounted returns of per-token rewards, whitened over all trained tokens.

    [..., T] -> [..., T]. The outcome reward belongs on the last trained token of its response.
    """
    returns = discounted_returns(rewards, mask, discount=discount, segment_ids=segment_ids)
    if segment_ids is not None:
        mask = jnp.asarray(mask).astype(bool) & (jnp.asarray(segment_ids) > 0)
    return masked_whiten(returns, mask)


def reinforce_plus_plus_baseline(
    rewards: ArrayLike, group_ids: ArrayLike, mask: ArrayLike, *, num_groups: int
) -> jax.Array:
    """REINFORCE++-baseline: r - group mean at every trained token, whitened over all; [N], [N], [N, T] -> [N, T]."""
    centred = _Groups(rewards, group_ids, num_groups).centred()
    mask = jnp.asarray(mask)
    if mask.ndim != 2 or mask.shape[0] != centred.shape[0]:
        raise ValueError(f"mask has shape {mask.shape}, expected [N, T] with N={centred.shape[0]}, one row per reward")
    return masked_whiten(jnp.broadcast_to(centred[:, None], mask.shape), mask)


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    mask: ArrayLike,
    *,
    discount: float = 1.0,
    lambda_: float = 1.0,
    bootstrap_value: ArrayLike = 0.0,
    segment_ids: ArrayLike | None = None,
) -> GAEOutput:
    """Generalised advantage estimation (arXiv 1506.02438) over the trained tokens only; a parallel scan over T.

    A_t = delta_t + discount lambda_ A_next, delta_t = r_t + discount v_next - v_t, where "next" is the next *trained*
    token: gaps in the mask (tool output, padding) are skipped, as in verl, Tunix and AReaL. Rewards at masked places
    are ignored; put the outcome reward on the response's last trained token.

    Args:
      rewards, values, mask: [..., T].
      discount, lambda_: 1 and 1, as usual for LLMs (AReaL, arXiv 2505.24298).
      bootstrap_value: the value after the last token, scalar or [...], for truncated rows; 0 after a real end.
      segment_ids: [..., T] int, for packed rows: every segment is scanned alone, from a scalar `bootstrap_value`.
    """
    values, rewards, mask = _arrays.inputs(mask, need_mask=True, detach=False, values=values, rewards=rewards)
    mask, last, segmented = _boundaries(mask, segment_ids)
    bootstrap = jnp.asarray(bootstrap_value).astype(jnp.float32)
    if segmented and bootstrap.ndim:
        raise ValueError(f"bootstrap_value has shape {bootstrap.shape}, expected a scalar when segment_ids are given")
    if bootstrap.ndim:
        _arrays.check_shape("bootstrap_value", bootstrap, values.shape[:-1], "values without T")
        bootstrap = bootstrap[..., None]
    bootstrap = jnp.broadcast_to(bootstrap, values.shape)
    here = _reverse_scan(jnp.where(mask, 0.0, 1.0), jnp.where(mask, values, 0.0), last, bootstrap)
    following = jnp.where(last, bootstrap, jnp.roll(here, -1, axis=-1))
    delta = jnp.where(mask, rewards + discount * following - values, 0.0)
    advantages = _reverse_scan(jnp.where(mask, discount * lambda_, 1.0), delta, last, jnp.zeros_like(bootstrap))
    advantages = jnp.where(mask, advantages, 0.0)
    return GAEOutput(advantages, jnp.where(mask, advantages + values, 0.0))


def discounted_returns(
    rewards: ArrayLike, mask: ArrayLike, *, discount: float = 1.0, segment_ids: ArrayLike | None = None
) -> jax.Array:
    """G_t = r_t + discount G_next over the trained tokens, gaps skipped as in `gae`; [..., T] -> [..., T]."""
    rewards, mask = _arrays.inputs(mask, need_mask=True, rewards=rewards)
    mask, last, _ = _boundaries(mask, segment_ids)
    returns = _reverse_scan(
        jnp.where(mask, discount, 1.0), jnp.where(mask, rewards, 0.0), last, jnp.zeros_like(rewards)
    )
    return jnp.where(mask, returns, 0.0)


def masked_whiten(
    values: ArrayLike, mask: ArrayLike, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over every trained place of all axes; 0 elsewhere, and 0 if all values are equal.

    Args:
      shift_mean: False keeps the mean (scales about it), as for value targets.
      ddof: 1 for the unbiased variance (verl, AReaL), 0 for the biased one (NeMo-RL). eps: 1e-8 as in verl.
    """
    values, mask = _arrays.inputs(mask, need_mask=True, values=values)
    count = mask.sum(dtype=jnp.int32).astype(jnp.float32)
    mean = values.sum() / jnp.maximum(count, 1.0)
    smallest = jnp.min(jnp.where(mask, values, jnp.inf), initial=jnp.inf)
    varied = smallest != jnp.max(jnp.where(mask, values, -jnp.inf), initial=-jnp.inf)  # a NaN is no equal value
    centred = jnp.where(mask & varied, values - mean, 0.0)  # exactly 0 without variation: rounding would be blown up
    variance = jnp.square(centred).sum() / jnp.maximum(count - ddof, 1.0)
    white = _divide(centred, _safe_sqrt(variance + eps))
    return white if shift_mean else jnp.where(mask, white + mean, 0.0)


def overlong_penalty(lengths: ArrayLike, *, max_length: float, buffer: float) -> jax.Array:
    """DAPO's soft overlong punishment (arXiv 2503.14476 Eq. 13), to be added to rewards; [...] -> [...].

    0 up to max_length - buffer tokens, then falling linearly to -1 at max_length, and -1 beyond. (verl and AReaL scale
    it by a factor, and have no floor because responses are cut at max_length.)

    Args:
      lengths: response lengths in tokens, ints or floats. max_length, buffer: required; the paper has 20480 and 4096.
    """
    if isinstance(buffer, (int, float)) and buffer <= 0:
        raise ValueError(f"buffer={buffer} must be above 0: the tokens over which the penalty grows to 1")
    return jnp.clip((max_length - buffer - jnp.asarray(lengths).astype(jnp.float32)) / buffer, -1.0, 0.0)


def informative_group_mask(rewards: ArrayLike, group_ids: ArrayLike, *, num_groups: int) -> jax.Array:
    """Which responses belong to a group whose rewards are not all equal; bool [N]. DAPO's dynamic sampling keeps these.

    With right/wrong rewards it keeps the groups with 0 < #right < n. Singletons and padding rows are False.
    """
    groups = _Groups(rewards, group_ids, num_groups)
    return groups.valid & groups.of_row(groups.varied)


class _Groups:
    """Sums over groups of one [N] array, with padding rows left out."""

    def __init__(self, rewards: ArrayLike, group_ids: ArrayLike, num_groups: int):
        rewards, group_ids = jnp.asarray(rewards), jnp.asarray(group_ids)
        self.num = _arrays.static_count("num_groups", num_groups)
        if rewards.ndim != 1:
            raise ValueError(f"rewards has shape {rewards.shape}, expected [N], one per response (vmap for more axes)")
        _arrays.check_shape("group_ids", group_ids, rewards.shape, "rewards")
        if not jnp.issubdtype(group_ids.dtype, jnp.integer):
            raise ValueError(f"group_ids has dtype {group_ids.dtype}, expected integers in 0..num_groups-1")
        self.valid = (group_ids >= 0) & (group_ids < self.num)
        self.ids = jnp.where(self.valid, group_ids, 0)
        self.rewards = jnp.where(self.valid, rewards.astype(jnp.float32), 0.0)
        self.count = self.sum(self.valid.astype(jnp.float32))
        smallest = jax.ops.segment_min(jnp.where(self.valid, self.rewards, jnp.inf), self.ids, self.num)
        largest = jax.ops.segment_max(jnp.where(self.valid, self.rewards, -jnp.inf), self.ids, self.num)
        self.varied = smallest != largest  # a NaN is no equal reward: it must be seen, not become an advantage of 0

    def sum(self, values: jax.Array) -> jax.Array:
        """[N], 0 at padding rows -> [num_groups]"""
        return jax.ops.segment_sum(values, self.ids, self.num)

    def of_row(self, statistic: jax.Array) -> jax.Array:
        return statistic[self.ids]

    def centred(self) -> jax.Array:
        """r - mean; exactly 0 in groups of equal rewards, where rounding would otherwise be divided by a tiny std."""
        mean = self.sum(self.rewards) / jnp.maximum(self.count, 1.0)
        return jnp.where(self.valid & self.of_row(self.varied), self.rewards - self.of_row(mean), 0.0)


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt whose gradient at 0 is 0, not inf."""
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, and 0 where scale is 0."""
    return jnp.where(scale == 0, 0.0, x / jnp.where(scale == 0, 1.0, scale))


def _boundaries(mask: jax.Array, segment_ids: ArrayLike | None) -> tuple[jax.Array, jax.Array, bool]:
    """The mask without padding, and which places have no successor: the row's end, and before another segment."""
    length = mask.shape[-1]
    end = jnp.broadcast_to(np.arange(length) == length - 1, mask.shape)
    if segment_ids is None:
        return mask, end, False
    segment_ids = _arrays.checked_segment_ids(segment_ids, mask.shape, "mask")
    return mask & (segment_ids > 0), end | (segment_ids != jnp.roll(segment_ids, -1, axis=-1)), True


def _reverse_scan(factor: jax.Array, term: jax.Array, last: jax.Array, after: jax.Array) -> jax.Array:
    """x_t = factor_t x_{t+1} + term_t along the last axis, with x_{t+1} = after_t at `last` places; O(log T) deep."""
    term = jnp.where(last, term + factor * after, term)
    factor = jnp.where(last, 0.0, factor).astype(jnp.float32)

    def compose(later, earlier):
        return later[0] * earlier[0], earlier[0] * later[1] + earlier[1]

    return jax.lax.associative_scan(compose, (factor, term), reverse=True, axis=term.ndim - 1)[1]
