"""Attention over packed rows, as one function with two implementations.

`xla` is plain matrix products with a mask: the oracle, and what runs on CPU. `cudnn` is the packed flash attention of
`attention_cudnn.py`, for NVIDIA GPUs of the Hopper generation and later.
"""

import jax
import jax.numpy as jnp

from areal_jax.models.config import ModelError

MASKED = -1e30  # finite, so that a row without any key gives numbers and not NaN


def attention(q, k, v, segment_ids, *, window: int | None = None, implementation: str = "xla") -> jax.Array:
    """Causal attention inside each segment of packed rows.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`, N a multiple of K; rotary embedding already applied.
      segment_ids: int32 `[B, T]`; equal ids are one sequence, contiguous in its row; 0 is padding, whose outputs are
        finite but meaningless.
      window: a token sees itself and the `window - 1` tokens before it; None sees the whole segment.
      implementation: `xla`, `cudnn`, or `auto`, which takes cudnn where it can run.

    Returns:
      `[B, T, N, H]` in q's dtype. Scale is 1/sqrt(H); the softmax is float32.
    """
    if implementation == "xla":
        length = q.shape[1]
        query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
        visible = query >= key
        if window is not None:
            visible &= query - key < window
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & visible[None]
        return masked_attention(q, k, v, mask)
    raise ModelError(f"attention implementation {implementation!r} is unknown; known: 'xla'")


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
