"""Attention over packed rows, as one function with two implementations.

`xla` is plain matrix products with a mask: the oracle, and what runs on CPU. `cudnn` is the packed flash attention of
`attention_cudnn.py`, for NVIDIA GPUs of the Hopper generation and later.
"""

import logging

import jax
import jax.numpy as jnp

from areal_jax.models import attention_cudnn
from areal_jax.models.config import ModelError
from areal_jax.models.sharding import ANYWHERE, Place

MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN
IMPLEMENTATIONS = ("auto", "xla", "cudnn")


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
    if jax.default_backend() != "gpu":
        return "xla"
    try:
        attention_cudnn.require(dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    except ModelError as e:
        logging.getLogger(__name__).warning("attention falls back to XLA, which is slow and large: %s", e)
        return "xla"
    return "cudnn"


def _xla(q, k, v, segment_ids, window):
    """Blocks of queries, each against the keys up to its end: less work, and a fraction of the memory."""
    length = q.shape[1]
    size = -(-length // max(1, min(4, length // 32)))
    index, out = jnp.arange(length), []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = index[start:stop, None] - index[None, first:stop]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        same = segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]
        out.append(masked_attention(q[:, start:stop], k[:, first:stop], v[:, first:stop], same & visible[None]))
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def masked_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_BxTxS) -> jax.Array:
    """Softmax attention of T queries over S keys under a boolean mask; grouped queries share a key/value head."""
    rows, length, heads, size = q_BxTxNxH.shape
    kv_heads = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(rows, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BxSxKxH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BxTxS[:, None, None], scores * size**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v_BxSxKxH)
    return out.reshape(q_BxTxNxH.shape)
