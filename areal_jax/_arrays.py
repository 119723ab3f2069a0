"""What the three objective modules share: checked inputs, masks that are safe to differentiate, and sums per sequence.

Not a public module. It imports nothing else of the project, so that `losses`, `advantages` and `corrections` can be
copied out together with it.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

MAX_LOG_RATIO = 20.0  # e^20 squared still fits a float32; beyond it a ratio carries no information anyway
OPTIONAL = ("weights", "old_values")  # per-token arguments that may be None
WIDE_LOG_RATIO = 1e4  # for sums of log-ratios: opposite infinities must add up to a number


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...], owner: str) -> None:
    """Raises a ValueError that names the argument, its shape, and the shape it should have."""
    if array.shape == shape:
        return
    hint = ""
    if name == "advantages" and array.shape in (shape[:-1], (*shape[:-1], 1)):
        hint = "; give every token its sequence's advantage, e.g. jnp.broadcast_to(advantages[:, None], mask.shape)"
    raise ValueError(f"{name} has shape {array.shape}, expected {shape}, the shape of {owner}{hint}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def static_count(name: str, value: object) -> int:
    """A size that must be known when the function is traced, as a Python int of at least 1."""
    try:
        count = operator.index(value)
    except Exception as error:  # jax raises errors of several kinds for a traced value
        raise ValueError(f"{name}={value!r} must be a Python int (static under jit: it sets a shape)") from error
    if count < 1:
        raise ValueError(f"{name}={count} must be at least 1")
    return count


def inputs(
    mask: ArrayLike | None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    need_mask: bool = False,
    detach: bool = True,
    **arrays: ArrayLike | None,
) -> tuple[jax.Array | None, ...]:
    """Checks per-token arguments and returns them as float32, with 0 at every masked place, and the mask last.

    The first array sets the shape and is differentiated; the others are constants (stop_gradient) if `detach`. Masked
    places enter as zeros, so neither -inf nor NaN there reaches a value or a gradient, and every loss is 0 there.
    Tokens outside segments 1..num_segments count as masked. The mask is None when neither it nor segments are given,
    and so is an array of OPTIONAL that is not.
    """
    for name, value in arrays.items():
        if value is None and name not in OPTIONAL:
            raise ValueError(f"{name} is None, expected an array [..., T]")
    owner, first = next(iter(arrays.items()))
    shape = jnp.shape(first)
    if not shape:
        raise ValueError(f"{owner} is a scalar, expected an array [..., T]")
    if mask is None and need_mask:
        raise ValueError("mask is None, expected the trained tokens as an array of bool or 0/1, shaped like " + owner)
    if mask is not None:
        mask = jnp.asarray(mask)
        check_shape("mask", mask, shape, owner)
        mask = mask.astype(bool)
    live = _live(segment_ids, num_segments, shape, owner)
    if live is not None:
        mask = live if mask is None else mask & live
    out = []
    for name, value in arrays.items():
        if value is None:
            out.append(None)
            continue
        value = jnp.asarray(value)
        check_shape(name, value, shape, owner)
        value = value.astype(jnp.float32)
        if detach and name != owner:
            value = jax.lax.stop_gradient(value)
        out.append(value if mask is None else jnp.where(mask, value, 0.0))
    return (*out, mask)


def _live(
    segment_ids: ArrayLike | None, num_segments: int | None, shape: tuple[int, ...], owner: str
) -> jax.Array | None:
    """Which tokens belong to a segment; None where rows are sequences."""
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError("num_segments is given without segment_ids; packed rows need both, plain rows neither")
        return None
    if num_segments is None:
        raise ValueError(
            "segment_ids needs num_segments: a Python int, the most segments that a row may hold (ids 1..num_segments)"
        )
    count = static_count("num_segments", num_segments)
    known = isinstance(segment_ids, np.ndarray) or (
        isinstance(segment_ids, jax.Array) and not isinstance(segment_ids, Tracer) and segment_ids.is_fully_addressable
    )
    largest = int(np.asarray(segment_ids).max(initial=0)) if known else 0
    segment_ids = checked_segment_ids(segment_ids, shape, owner)
    if largest > count:  # under jit the values are unknown, and such tokens count as padding
        raise ValueError(f"segment_ids holds the id {largest}, but num_segments={count}: ids run from 1 per row")
    return (segment_ids > 0) & (segment_ids <= count)


def checked_segment_ids(segment_ids: ArrayLike, shape: tuple[int, ...], owner: str) -> jax.Array:
    segment_ids = jnp.asarray(segment_ids)
    check_shape("segment_ids", segment_ids, shape, owner)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected integers (0 = padding)")
    return segment_ids


def log_ratio(logprobs: jax.Array, other: jax.Array, bound: float = MAX_LOG_RATIO) -> jax.Array:
    """log(pi / other), kept within ±bound (no gradient outside); 0 where both probabilities are 0."""
    both = jnp.isneginf(logprobs) & jnp.isneginf(other)
    return jnp.clip(jnp.where(both, 0.0, logprobs) - jnp.where(both, 0.0, other), -bound, bound)


def _membership(segment_ids: ArrayLike, num_segments: int) -> jax.Array:
    """[..., S, T] bool, to be selected and summed over. Not a dot product, because accelerators run float32 dots at
    reduced precision by default; not a scatter, whose float sums are not repeatable on GPUs. XLA can fuse it away; its
    CPU backend stores it, 4 · S bytes per token and use, which is little at sizes that a CPU trains."""
    ids = jnp.arange(1, num_segments + 1, dtype=jnp.int32).reshape(num_segments, 1)
    segment_ids = jnp.asarray(segment_ids).astype(jnp.int32)[..., None, :]
    return segment_ids == ids.reshape((1,) * (segment_ids.ndim - 2) + ids.shape)


def sequence_reduce(
    values: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None, *, largest: bool = False
) -> jax.Array:
    """Sums (or largest values, at least 0) of `values` per sequence: [..., T] -> [..., S]; S = 1 where rows are
    sequences. `values` are 0 at masked places."""
    reduce = jnp.max if largest else jnp.sum
    if segment_ids is None:
        return reduce(values, axis=-1, keepdims=True, initial=0)
    member = _membership(segment_ids, num_segments)
    return reduce(jnp.where(member, values[..., None, :], jnp.zeros((), values.dtype)), axis=-1, initial=0)


def spread(
    statistics: jax.Array, like: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None
) -> jax.Array:
    """Gives every token its sequence's statistic: [..., S] -> [..., T]; 0 outside every segment."""
    if segment_ids is None:
        return jnp.broadcast_to(statistics, like.shape)
    member = _membership(segment_ids, num_segments)
    return jnp.sum(jnp.where(member, statistics[..., :, None], jnp.zeros((), statistics.dtype)), axis=-2)


def sequence_total(values: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None) -> jax.Array:
    """The sum over the token's own sequence, at every token: [..., T] -> [..., T]."""
    return spread(sequence_reduce(values, segment_ids, num_segments), values, segment_ids, num_segments)


def sequence_mean(
    values: jax.Array, mask: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None
) -> jax.Array:
    """The mean over the trained tokens of the token's own sequence, at every token; 0 for an empty sequence."""
    count = sequence_total(mask.astype(jnp.float32), segment_ids, num_segments)
    return sequence_total(values, segment_ids, num_segments) / jnp.maximum(count, 1.0)
