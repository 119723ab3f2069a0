"""Log-probabilities and entropies of chosen tokens from hidden states, without ever holding `[tokens, vocab]`.

The head's product, the softmax and both statistics run over chunks of tokens, forward and backward; the backward pass
recomputes a chunk's logits from the hidden states. Everything after the product is float32.
"""

import functools

import jax
import jax.numpy as jnp

from areal_jax.models.sharding import ANYWHERE, Place

# Float32 logits alive per device: 512 MiB, and on a GPU 2 GiB, where each chunk reads and writes the head's gradient.
LOGITS_PER_CHUNK, LOGITS_PER_CHUNK_GPU = 2**27, 2**29


def head_logits(hidden: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """Float32 logits `[..., V]`: products of values in hidden's dtype, accumulated in float32 (an fp32 head)."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    contracting = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        hidden, head_VxD.astype(hidden.dtype), contracting, precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_logprobs(hidden_RxMxD, head_VxD, targets_RxM, temperature, chunk: int, place: Place = ANYWHERE):
    """Log-prob and entropy of `targets` under softmax(hidden · headᵀ / temperature), in chunks of M.

    Args:
      hidden_RxMxD: hidden states after the final norm, in compute dtype; R may be sharded, M is chunked.
      head_VxD: head weights, cast to hidden's dtype; V may be sharded. Their gradient is accumulated in float32.
      targets_RxM: int32 token ids.
      temperature: float32 scalar; not differentiated.
      chunk: tokens of each row per chunk.
      place: where arrays live, by their logical axes. The head is gathered once, before the loop,
        and its gradient is summed over R once, after it.

    Returns:
      `(logprobs, entropy)`, float32 `[R, M]`.
    """
    return _forward(hidden_RxMxD, head_VxD, targets_RxM, temperature, chunk, place)[0]


def chunk_size(tokens: int, vocab: int, logits: int | None = None) -> int:
    """Tokens per chunk (of one device): as few chunks, of equal size, as have `logits` logits each at most."""
    if logits is None:
        logits = LOGITS_PER_CHUNK_GPU if jax.default_backend() == "gpu" else LOGITS_PER_CHUNK
    chunks = -(-tokens // max(128, logits // vocab))
    return -(-tokens // chunks)


def _chunks(x_RxM, chunk):
    """`[R, M, ...]` -> `[M / chunk, R, chunk, ...]`, the last chunk padded with zeros."""
    rows, tokens = x_RxM.shape[:2]
    pad = -tokens % chunk
    x = jnp.pad(x_RxM, ((0, 0), (0, pad)) + ((0, 0),) * (x_RxM.ndim - 2))
    return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _unchunk(x_CxRxc, tokens):
    x = x_CxRxc.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _is_target(targets, vocab):
    """Boolean `[..., V]`; compares instead of gathering, which stays local when V is sharded."""
    ids = jnp.arange(vocab, dtype=targets.dtype)
    return targets[..., None] == ids.reshape((1,) * targets.ndim + (vocab,))


def _forward(hidden, head, targets, temperature, chunk, place):
    gathered = place(head.astype(hidden.dtype), "vocab", None)

    def one(_, inputs):
        h, target = inputs
        z = place(head_logits(h, gathered), "batch", None, "vocab") / temperature
        largest = jnp.max(z, axis=-1, keepdims=True)
        below = z - largest
        e = jnp.exp(below)
        # Three sums over the vocabulary that a GPU takes in one pass over the logits.
        total, weighted = jnp.sum(e, axis=-1), jnp.sum(e * below, axis=-1)
        chosen = jnp.sum(jnp.where(_is_target(target, z.shape[-1]), below, 0.0), axis=-1)
        log_total = jnp.log(total)
        return None, (chosen - log_total, log_total - weighted / total, largest[..., 0] + log_total)

    _, outs = _scan(one, None, (_chunks(hidden, chunk), _chunks(targets, chunk)))
    logprobs, entropy, lse = (_unchunk(x, hidden.shape[1]) for x in outs)
    return (logprobs, entropy), (hidden, head, targets, temperature, entropy, lse)


def _backward(chunk, place, residuals, cotangents):
    hidden, head, targets, temperature, entropy, lse = residuals
    gathered = place(head.astype(hidden.dtype), "vocab", None)
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    matmul = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def one(d_head, inputs):
        h, target, ent, lse, d_logprob, d_entropy = inputs
        z = place(head_logits(h, gathered), "batch", None, "vocab") / temperature
        log_p = z - lse[..., None]
        p = jnp.exp(log_p)
        d_z = d_logprob[..., None] * (_is_target(target, z.shape[-1]).astype(jnp.float32) - p)
        d_z -= d_entropy[..., None] * p * (log_p + ent[..., None])
        d_z = (d_z / temperature).astype(h.dtype)
        d_head = place(d_head + matmul("rcv,rcd->rvd", d_z, h), "batch", "vocab", None)
        return d_head, matmul("rcv,vd->rcd", d_z, gathered).astype(h.dtype)

    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, entropy, lse, *cotangents))
    zeros = jnp.zeros((hidden.shape[0], *head.shape), jnp.float32)
    d_head, d_hidden = _scan(one, place(zeros, "batch", "vocab", None), inputs)
    d_head = place(jnp.sum(d_head, axis=0), "vocab", "embed")
    return _unchunk(d_hidden, hidden.shape[1]), d_head.astype(head.dtype), None, None


def _scan(body, carry, xs):
    """`lax.scan`, but a single chunk is computed without a loop, which is what small models have."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, xs)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)


chunked_logprobs.defvjp(_forward, _backward)
