"""How the embedded engine draws a token: pure functions of logits, and of random numbers that depend on nothing but
(run seed, group, sample, position). A token is therefore the same in whatever slot, batch, worker or order it is drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sampling_logprobs(logits, temperature, top_k, top_p) -> jax.Array:
    """Log-probs of the distribution that tokens are sampled from, per row.

    In this order: divide by the temperature, keep the `top_k` largest, keep the smallest set of the most probable ones
    whose probability reaches `top_p` (at least one; ties at the edge are all kept), renormalise.

    Args:
      logits: `[N, V]`, any float dtype; -inf forbids a token.
      temperature: float32 `[N]`; 0 is greedy, whose log-probs are those of temperature 1 without top_k and top_p.
      top_k: int32 `[N]`; 0 keeps all.
      top_p: float32 `[N]` in (0, 1]; 1 keeps all.

    Returns:
      float32 `[N, V]`; -inf where a token cannot be drawn.
    """
    greedy = temperature <= 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)[:, None]
    limited = ~greedy & ((top_k > 0) | (top_p < 1))
    # The sort is the price of every row as soon as one row asks for it, and of none otherwise.
    scaled = jax.lax.cond(jnp.any(limited), _restrict, lambda scaled, *_: scaled, scaled, limited, top_k, top_p)
    return jax.nn.log_softmax(scaled, axis=-1)


def _restrict(scaled, limited, top_k, top_p):
    vocabulary = scaled.shape[-1]
    rank = jnp.arange(vocabulary)[None, :]
    ordered = -jnp.sort(-scaled, axis=-1)
    ordered = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # top_p = 1 keeps all by definition: rounding in the sum must not cut the tail off.
    kept = ((before < top_p[:, None]) | (top_p[:, None] >= 1)) & (ordered > -jnp.inf)
    smallest = jnp.min(jnp.where(kept | (rank == 0), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(limited[:, None] & (scaled < smallest), -jnp.inf, scaled)


def request_keys(identity) -> jax.Array:
    """Keys `[N]` from int32 `[N, 3]` rows of (run seed, group, sample); negative numbers are as good as others."""

    def one(row):
        seed, group, sample = row.astype(jnp.uint32)
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), group), sample)

    return jax.vmap(one)(identity)


def draw(logprobs, keys, positions, temperature) -> tuple[jax.Array, jax.Array]:
    """One token per row, by the largest of log-prob plus Gumbel noise; greedy rows take the most probable token.

    Args:
      logprobs: float32 `[N, V]` of `sampling_logprobs`.
      keys: `[N]` of `request_keys`.
      positions: int32 `[N]`, the index that the new token will have in its sequence.
      temperature: float32 `[N]`.

    Returns:
      `(tokens, logprobs)`: int32 `[N]`, float32 `[N]`; the log-prob is NaN where there is no number to compare.
    """
    noise = jax.vmap(lambda key, at: jax.random.gumbel(jax.random.fold_in(key, at), logprobs.shape[1:], jnp.float32))
    noisy = logprobs + jnp.where(temperature[:, None] > 0, noise(keys, positions), 0.0)
    # An argmax of two reductions: XLA's own computes the noise anew for every comparison on CPUs.
    index = jnp.arange(logprobs.shape[-1], dtype=jnp.int32)[None, :]
    largest = noisy == jnp.max(noisy, axis=-1, keepdims=True)
    tokens = jnp.min(jnp.where(largest, index, logprobs.shape[-1]), axis=-1)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def forbid(logits, tokens, where) -> jax.Array:
    """`logits` `[N, V]` with -inf at `tokens` (int32 `[N, M]`, -1 for none) in the rows of bool `[N]` `where`."""

    def ban(logits):
        banned = jnp.any(tokens[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :], axis=1)
        return jnp.where(banned & where[:, None], -jnp.inf, logits)

    return jax.lax.cond(jnp.any(where), ban, lambda logits: logits, logits)
