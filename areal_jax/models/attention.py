"""Attention over packed rows, as one function with two implementations.

`xla` is plain matrix products with a mask: the oracle, and what runs on CPU. `cudnn` is the packed flash attention of
`attention_cudnn.py`, for NVIDIA GPUs of the Hopper generation and later.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from areal_jax.models import attention_cudnn
from areal_jax.models.config import ModelError
from areal_jax.models.precision import precision_of
from areal_jax.models.sharding import ANYWHERE, Place, on_gpu

MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
IMPLEMENTATIONS = ("auto", "xla", "cudnn")
XLA_KEEPS = ("attention_xla_out", "attention_xla_normalizer")  # what the backward pass of `xla` needs beside q, k, v


def attention(
    q,
    k,
    v,
    segment_ids,
    *,
    window: int | None = None,
    implementation: str = "xla",
    max_segments: int = 64,
    place: Place = ANYWHERE,
) -> jax.Array:
    """Causal attention inside each segment of packed rows.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`, N a multiple of K; rotary embedding already applied.
      segment_ids: int32 `[B, T]`; equal ids are one sequence, contiguous in its row; 0 is padding, whose outputs are
        finite but meaningless.
      window: a token sees itself and the `window - 1` tokens before it; None sees the whole segment.
      implementation: `xla` or `cudnn`.
      max_segments: for cudnn, the most segments a row may hold; a row with more gives NaN. Its softmax statistics take
        4 · B · max_segments · N · T bytes, so no more than rows can hold.
      place: for cudnn, the mesh that rows are split over.

    Returns:
      `[B, T, N, H]` in q's dtype. Scale is 1/sqrt(H); the softmax is float32.

    Raises:
      ModelError: the implementation is unknown, or cannot run here.
    """
    if implementation == "xla":
        return _xla(q, k, v, segment_ids, window)
    if implementation == "cudnn":
        attention_cudnn.require(q.dtype, heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3])
        return attention_cudnn.attention(q, k, v, segment_ids, window=window, max_segments=max_segments, place=place)
    raise ModelError(f"attention implementation {implementation!r} is unknown; known: xla, cudnn")


def resolve(implementation: str, dtype, *, heads: int, kv_heads: int, head_dim: int) -> str:
    """What `auto` means on this machine: `cudnn` where it can run, else `xla`, with a warning if there is a GPU."""
    if implementation != "auto":
        return implementation
    if not on_gpu():
        return "xla"
    try:
        attention_cudnn.require(dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    except ModelError as e:
        logging.getLogger(__name__).warning("attention falls back to XLA, which is slow and large: %s", e)
        return "xla"
    return "cudnn"


def _xla(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids, window):
    rows, length, heads, size = q_BxTxNxH.shape
    kv_heads = k_BxTxKxH.shape[2]
    q = q_BxTxNxH.reshape(rows, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BxTxKxH, v_BxTxKxH))
    return _blocks(q, k, v, segment_ids, window).transpose(0, 3, 1, 2, 4).reshape(q_BxTxNxH.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q, k, v, segment_ids, window):
    """Attention of q `[B, K, G, T, H]` over k and v `[B, K, T, H]`, in the shape of q.

    Blocks of queries, each against the keys up to its end: less work, and a fraction of the memory. The backward pass
    computes the scores again: they are larger than all else that a layer would keep. Its sums over queries are written
    so that queries are the left operand's second-last axis: XLA's CPU code is four times slower at the transposed form,
    which is the one that differentiation would make.
    """
    return _blocks_forward(q, k, v, segment_ids, window)[0]


def _blocks_forward(q, k, v, segment_ids, window):
    out, normalizer = [], []
    for queries, keys in _spans(segment_ids.shape[1], window):
        scores = _scores(q, k, segment_ids, queries, keys, window)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out.append(_einsum("bkgts,bksh->bkgth", (weights / total).astype(v.dtype), v[:, :, keys]))
        normalizer.append(largest + jnp.log(total))
    out, normalizer = (checkpoint_name(jnp.concatenate(x, axis=3), n) for x, n in zip((out, normalizer), XLA_KEEPS))
    return out, (q, k, v, segment_ids, out, normalizer)


def _blocks_backward(window, residuals, d_out):
    q, k, v, segment_ids, out, normalizer = residuals
    rows, kv_heads, length, size = k.shape

    def sums(formula, a, b):  # in float32, whatever the dtype: XLA's CPU code has no such product of bf16
        return jnp.einsum(formula, a.astype(jnp.float32), b.astype(jnp.float32), precision=precision_of(a))

    d_total = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], *(jnp.zeros((rows, kv_heads, size, length), jnp.float32) for _ in range(2))
    for queries, keys in _spans(length, window):
        of_q, of_out = q[..., queries, :], d_out[..., queries, :]
        scores = _scores(q, k, segment_ids, queries, keys, window)
        weights = jnp.exp(scores - normalizer[..., queries, :])
        d_weights = sums("bkgth,bksh->bkgts", of_out, v[:, :, keys])
        d_scores = (weights * (d_weights - d_total[..., queries, :]) * size**-0.5).astype(q.dtype)
        d_q.append(_einsum("bkgts,bksh->bkgth", d_scores, k[:, :, keys]))
        d_k = d_k.at[..., keys].add(sums("bkgth,bkgts->bkhs", of_q, d_scores))
        d_v = d_v.at[..., keys].add(sums("bkgth,bkgts->bkhs", of_out, weights.astype(v.dtype)))
    d_k, d_v = (x.swapaxes(2, 3).astype(k.dtype) for x in (d_k, d_v))
    # Whole arrays: fused into what comes next, each of them would be read across its rows.
    return *jax.lax.optimization_barrier((jnp.concatenate(d_q, axis=3), d_k, d_v)), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _einsum(formula, a, b, **options):
    return jnp.einsum(formula, a, b, precision=precision_of(a), **options)


def _spans(length: int, window: int | None):
    """For each block of queries: its slice, and that of the keys that any of them may see."""
    size = -(-length // max(1, min(4, length // 64)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _scores(q, k, segment_ids, queries: slice, keys: slice, window):
    """Scaled and masked scores of one block, float32 `[B, K, G, queries, keys]`."""
    index = jnp.arange(segment_ids.shape[1])
    distance = index[queries, None] - index[None, keys]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mask = visible[None] & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
    of_q, of_k = q[..., queries, :], k[:, :, keys]
    scores = _einsum("bkgth,bksh->bkgts", of_q, of_k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, MASKED)
