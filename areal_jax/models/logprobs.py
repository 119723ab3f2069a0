"""Log-probabilities and entropies of chosen tokens from hidden states, without ever holding `[tokens, vocab]`.

The head's product, the softmax and both statistics run over chunks of tokens, forward and backward; the backward pass
recomputes a chunk's logits from the hidden states. Everything after the product is float32. Where a loss is a sum over
tokens its gradient is known while a chunk's logits are still there: `chunked_loss` computes nothing twice.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from areal_jax.models.precision import precision_of
from areal_jax.models.sharding import ANYWHERE, Place, on_gpu

# Float32 logits alive per device: 512 MiB, and on a GPU 2 GiB, where each chunk reads and writes the head's gradient.
LOGITS_PER_CHUNK, LOGITS_PER_CHUNK_GPU = 2**27, 2**29


def head_logits(hidden: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """Float32 logits `[..., V]`: products of values in hidden's dtype, accumulated in float32 (an fp32 head)."""
    contracting, head_VxD = (((hidden.ndim - 1,), (1,)), ((), ())), head_VxD.astype(hidden.dtype)
    return jax.lax.dot_general(
        hidden, head_VxD, contracting, precision=precision_of(hidden), preferred_element_type=jnp.float32
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
        logits = LOGITS_PER_CHUNK_GPU if on_gpu() else LOGITS_PER_CHUNK
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


def _scan(body, carry, xs):
    """`lax.scan`, but a single chunk is computed without a loop, which is what small models have."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, xs)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)


def _statistics(z, target):
    """(log-prob of the target, entropy, log of the sum of exponentials), `[...]` each, of logits `[..., V]`."""
    at_target = jnp.where(_is_target(target, z.shape[-1]), z, 0.0)
    largest, total, weighted, chosen = (_one_pass if on_gpu() else _two_passes)(z, at_target)
    log_total = jnp.log(total)
    return chosen - largest - log_total, log_total - weighted / total, largest + log_total


def _two_passes(z, at_target):
    """Over the vocabulary: the largest logit m, Σ e^(z - m), Σ e^(z - m) (z - m), and Σ at_target."""
    largest = jnp.max(z, axis=-1, keepdims=True)
    below = z - largest
    e = jnp.exp(below)
    return largest[..., 0], jnp.sum(e, axis=-1), jnp.sum(e * below, axis=-1), jnp.sum(at_target, axis=-1)


def _one_pass(z, at_target):
    """The same, reading the logits once: of two parts, that with the smaller m has its sums brought to the other's."""

    def join(a, b):
        swap, below = b[0] > a[0], -jnp.abs(a[0] - b[0])
        scale = jnp.exp(below)
        total, weighted = (jnp.where(swap, y, x) for x, y in zip(a[1:3], b[1:3]))
        low_total, low_weighted = (jnp.where(swap, x, y) for x, y in zip(a[1:3], b[1:3]))
        weighted += (low_weighted + below * low_total) * scale
        return jnp.maximum(a[0], b[0]), total + low_total * scale, weighted, a[3] + b[3]

    def over_last(xs):
        nothing = (jnp.float32(-1e30), *[jnp.float32(0)] * 3)  # finite: two of them differ by 0
        return jax.lax.reduce(tuple(xs), nothing, join, (xs[0].ndim - 1,))

    parts = math.gcd(z.shape[-1], 16)  # XLA would split so long a row as well, but into parts that it has to pad
    xs = (z, jnp.ones_like(z), jnp.zeros_like(z), at_target)
    return over_last(over_last([x.reshape(*x.shape[:-1], parts, -1) for x in xs]))


def _logit_gradient(z, target, entropy, lse, d_logprob, d_entropy):
    log_p = z - lse[..., None]
    p = jnp.exp(log_p)
    d_z = d_logprob[..., None] * (_is_target(target, z.shape[-1]).astype(jnp.float32) - p)
    return d_z - d_entropy[..., None] * p * (log_p + entropy[..., None])


@dataclasses.dataclass(frozen=True)
class _Head:
    """The head's products, one chunk at a time: logits, and what their gradient means for both factors."""

    weights_VxD: jax.Array  # in hidden's dtype, gathered
    temperature: jax.Array
    place: Place

    def logits(self, h_Rxc):
        return self.place(head_logits(h_Rxc, self.weights_VxD), "batch", None, "vocab") / self.temperature

    def gradients(self, d_z, h, d_head):
        """(`d_head`, float32 `[R, V, D]`, with this chunk's share added; the gradient of the hidden states)."""
        matmul = functools.partial(jnp.einsum, precision=precision_of(h), preferred_element_type=jnp.float32)
        d_z = (d_z / self.temperature).astype(h.dtype)
        d_head = self.place(d_head + matmul("rcv,rcd->rvd", d_z, h), "batch", "vocab", None)
        return d_head, matmul("rcv,vd->rcd", d_z, self.weights_VxD).astype(h.dtype)

    def no_gradient(self, rows):
        zeros = jnp.zeros((rows, *self.weights_VxD.shape), jnp.float32)
        return self.place(zeros, "batch", "vocab", None)

    def sum(self, d_head_RxVxD, dtype):
        return self.place(jnp.sum(d_head_RxVxD, axis=0), "vocab", "embed").astype(dtype)


def _head(hidden, head, temperature, place):
    return _Head(place(head.astype(hidden.dtype), "vocab", None), temperature, place)


def _forward(hidden, head, targets, temperature, chunk, place):
    head_ = _head(hidden, head, temperature, place)

    def one(_, inputs):
        h, target = inputs
        return None, _statistics(head_.logits(h), target)

    _, outs = _scan(one, None, (_chunks(hidden, chunk), _chunks(targets, chunk)))
    logprobs, entropy, lse = (_unchunk(x, hidden.shape[1]) for x in outs)
    return (logprobs, entropy), (hidden, head, targets, temperature, entropy, lse)


def _backward(chunk, place, residuals, cotangents):
    hidden, head, targets, temperature, entropy, lse = residuals
    head_ = _head(hidden, head, temperature, place)

    def one(d_head, inputs):
        h, *rest = inputs
        return head_.gradients(_logit_gradient(head_.logits(h), *rest), h, d_head)

    inputs = tuple(_chunks(x, chunk) for x in (hidden, targets, entropy, lse, *cotangents))
    d_head, d_hidden = _scan(one, head_.no_gradient(hidden.shape[0]), inputs)
    return _unchunk(d_hidden, hidden.shape[1]), head_.sum(d_head, head.dtype), None, None


chunked_logprobs.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def chunked_loss(loss, hidden_RxMxD, head_VxD, targets_RxM, arrays, temperature, chunk: int, place: Place = ANYWHERE):
    """A sum over tokens of a function of their log-probs and entropies; its gradient costs three products, not four.

    Args:
      loss: `(logprobs, entropy, arrays) -> (scalar, aux)` of any columns of `[R, M]`: it sees all of them for its
        value, and a chunk of them for its gradient. The sum over chunks must be the whole; a place where every array of
        `arrays` is 0 must add nothing. Closes over no traced value.
      arrays: `(tree of [R, M] arrays, anything)`: the first is cut in chunks, the second given to every call as it is.
      hidden_RxMxD, head_VxD, targets_RxM, temperature, chunk, place: as in `chunked_logprobs`.

    Returns:
      What `loss` returns.
    """
    return _loss_forward(loss, hidden_RxMxD, head_VxD, targets_RxM, arrays, temperature, chunk, place)[0]


def _loss_forward(loss, hidden, head, targets, arrays, temperature, chunk, place):
    head_ = _head(hidden, head, temperature, place)
    by_token, constant = arrays
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)

    def one(d_head, inputs):
        h, target, x = inputs
        z = head_.logits(h)
        logprob, entropy, lse = _statistics(z, target)
        d_stats, _ = gradient(logprob, entropy, (x, constant))
        d_head, d_h = head_.gradients(_logit_gradient(z, target, entropy, lse, *d_stats), h, d_head)
        return d_head, (logprob, entropy, d_h)

    inputs = jax.tree.map(lambda x: _chunks(x, chunk), (hidden, targets, by_token))
    d_head, outs = _scan(one, head_.no_gradient(hidden.shape[0]), inputs)
    logprobs, entropy, d_hidden = (_unchunk(x, hidden.shape[1]) for x in outs)
    return loss(logprobs, entropy, arrays), (d_hidden, head_.sum(d_head, head.dtype))


def _loss_backward(loss, chunk, place, residuals, cotangents):
    scaled = ((cotangents[0] * x.astype(jnp.float32)).astype(x.dtype) for x in residuals)
    return *scaled, None, None, None


chunked_loss.defvjp(_loss_forward, _loss_backward)
