"""The one reduction of the objectives library: per-token values to a (sum, denominator) pair. Public in `losses`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from areal_jax import _arrays

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum")


class Weighted(NamedTuple):
    """A mean that has not been divided yet, so that it can be added over micro-batches and devices.

    `a + b` adds both parts (it does not concatenate); `mean()` divides, and is 0 where nothing was counted.
    """

    sum: jax.Array
    denominator: jax.Array

    def __add__(self, other: "Weighted | int") -> "Weighted":
        if isinstance(other, int) and other == 0:  # so that Python's sum() works
            return self
        return Weighted(self.sum + other.sum, self.denominator + other.denominator)

    __radd__ = __add__

    def mean(self) -> jax.Array:
        counted = self.denominator > 0
        return jnp.where(counted, self.sum, 0.0) / jnp.where(counted, self.denominator, 1.0)


def aggregate(
    per_token: ArrayLike,
    mask: ArrayLike,
    *,
    mode: str = "token_mean",
    num_tokens: ArrayLike | None = None,
    num_sequences: ArrayLike | None = None,
    horizon: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> Weighted:
    """Reduces per-token losses to a `(sum, denominator)` pair of float32 scalars; the objective is `sum / denominator`.

    With N tokens and S sequences that hold at least one trained token, m_i tokens in sequence i:

    | mode | sum | denominator | known as |
    |---|---|---|---|
    | `token_mean` | Σ l | N | DAPO, AReaL, verl `token-mean` |
    | `seq_mean_token_mean` | Σ_i (Σ_t l) / m_i | S | GRPO, verl `seq-mean-token-mean` |
    | `seq_mean_token_sum` | Σ l | S | verl `seq-mean-token-sum` |
    | `seq_mean_token_sum_norm` | Σ l | S · horizon | Dr. GRPO, verl `seq-mean-token-sum-norm` |
    | `token_sum` | Σ l | 1 | verl `token-sum` |

    The result does not depend on micro-batching or on the number of devices, if one of two things is done, not both:
    divide each micro-batch's sum by the *global* denominator (`num_tokens`, `num_sequences`: counts over the whole
    batch) and add the quotients; or leave them out, add the pairs (`Weighted.__add__`, `jax.lax.psum`), divide once. Of
    `token_sum` only the sums are added: each pair's denominator is 1. A sequence must not be split over micro-batches
    where the mode or the loss looks at whole sequences.

    The mask decides what counts. To drop tokens from the loss and still divide by the full count (as AReaL does for
    rejected tokens), give the smaller mask to the loss, which is 0 outside it, and the full mask here.

    Args:
      per_token: [..., T] floats. Anything, also NaN, at masked places.
      mask: [..., T] bool or 0/1: the trained tokens.
      mode: see the table. Default `token_mean`, the paper's (arXiv 2505.24298).
      num_tokens: scalar, replaces N in the denominator (used by `token_mean` only).
      num_sequences: scalar, replaces S in the denominator (used by the `seq_mean_*` modes only).
      horizon: scalar, the fixed length of Dr. GRPO (arXiv 2503.20783); `seq_mean_token_sum_norm` requires it.
      segment_ids: [..., T] int, for packed rows: 0 = padding, sequences numbered 1..num_segments in each row.
      num_segments: Python int, static; the most sequences that one row may hold.

    Raises:
      ValueError: when traced, for an unknown mode, wrong shapes, a missing `num_segments` or a missing `horizon`.
    """
    _arrays.check_choice("mode", mode, MODES)
    if mode == "seq_mean_token_sum_norm" and horizon is None:
        raise ValueError("mode='seq_mean_token_sum_norm' needs horizon: the constant length that sums are divided by")
    per_token, mask = _arrays.inputs(mask, segment_ids, num_segments, need_mask=True, per_token=per_token)
    if mode == "token_sum":
        return Weighted(per_token.sum(), jnp.ones((), jnp.float32))
    if mode == "token_mean":
        count = mask.sum(dtype=jnp.int32) if num_tokens is None else num_tokens
        return Weighted(per_token.sum(), jnp.asarray(count).astype(jnp.float32))
    lengths = _arrays.sequence_reduce(mask.astype(jnp.int32), segment_ids, num_segments)
    sums = _arrays.sequence_reduce(per_token, segment_ids, num_segments)
    if mode == "seq_mean_token_mean":
        sums = sums / jnp.maximum(lengths, 1).astype(jnp.float32)
    count = (lengths > 0).sum(dtype=jnp.int32) if num_sequences is None else num_sequences
    count = jnp.asarray(count).astype(jnp.float32)
    if mode == "seq_mean_token_sum_norm":
        count = count * jnp.asarray(horizon).astype(jnp.float32)
    return Weighted(sums.sum(), count)
