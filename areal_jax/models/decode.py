"""The cached forward for generation: prompts are prefilled into slots, then all slots advance one token per step.

The cache is `{"k", "v"}`, each `[layers, slots, length, kv_heads, head_dim]`. It is carried through the loop over
layers and updated in place, so a jitted caller should donate it. A slot's result depends on that slot alone, whatever
the others hold. The layers are those of the training forward; only how a query finds its keys differs.
"""

import jax
import jax.numpy as jnp

from areal_jax.models import logprobs
from areal_jax.models.attention import attention, masked_attention
from areal_jax.models.config import ModelError

Cache = dict[str, jax.Array]


def init_cache(model, slots: int, length: int, dtype=None) -> Cache:
    """Zeros for `slots` sequences of at most `length` tokens; dtype defaults to the model's compute dtype."""
    c = model.config
    shape = (c.num_layers, slots, length, c.num_kv_heads, c.head_dim)
    dtype = jnp.dtype(dtype or model.compute_dtype)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def prefill(model, params, cache: Cache, tokens, lengths, slots) -> tuple[jax.Array, Cache]:
    """Runs N prompts and writes their keys and values into their slots.

    Args:
      model, params: the network.
      cache: from `init_cache`; P must not exceed its length.
      tokens: int32 `[N, P]`, padded on the right.
      lengths: int32 `[N]`; a row of length 0 is padding and writes nothing.
      slots: int32 `[N]`, distinct; a row whose slot is out of range writes nothing.

    Returns:
      `(logits, cache)`: float32 `[N, V]`, the next-token logits at each prompt's last token.
    """
    width = tokens.shape[1]
    capacity, length = cache["k"].shape[1:3]
    if width > length:
        raise ModelError(f"prompts padded to {width} tokens do not fit a cache of {length} tokens per slot")
    net, index = model._network(params), jnp.arange(width, dtype=jnp.int32)[None]
    segment_ids = (index < lengths[:, None]).astype(jnp.int32)
    rope = net.rope(jnp.broadcast_to(index, tokens.shape))

    def attend(q, k, v, state):
        out = attention(q, k, v, segment_ids, window=model.config.sliding_window, implementation="xla")
        return out, (k.astype(cache["k"].dtype), v.astype(cache["v"].dtype))

    stacked, block = net.split_layers()

    def layer(x, params):
        return block(params)(x, rope, attend, None)

    x_MxD = net.embed(tokens.reshape(-1), model.compute_dtype)
    x_MxD, (k_LxNxPxKxH, v_LxNxPxKxH) = jax.lax.scan(layer, x_MxD, stacked)
    last_NxD = x_MxD[jnp.arange(len(lengths)) * width + jnp.maximum(lengths - 1, 0)]
    logits = logprobs.head_logits(net.normalize(last_NxD), net.head_weights())

    # Out of range means "do not write"; negative indices would count from the end, so they are mapped too.
    target = jnp.where((lengths > 0) & (slots >= 0) & (slots < capacity), slots, capacity)
    cache = {
        "k": cache["k"].at[:, target, :width].set(k_LxNxPxKxH, mode="drop"),
        "v": cache["v"].at[:, target, :width].set(v_LxNxPxKxH, mode="drop"),
    }
    return logits, cache


def step(model, params, cache: Cache, tokens, positions) -> tuple[jax.Array, Cache]:
    """Feeds one token to every slot.

    Args:
      model, params: the network.
      cache: what `prefill` and earlier steps wrote.
      tokens: int32 `[S]`, one per slot; idle slots may hold anything valid.
      positions: int32 `[S]`, the index in its sequence at which each token is written, below the cache's length.

    Returns:
      `(logits, cache)`: float32 `[S, V]`, the logits of each slot's next token.
    """
    net, slots, length = model._network(params), jnp.arange(tokens.shape[0]), cache["k"].shape[2]
    rope = net.rope(positions[:, None])
    index = jnp.arange(length)[None, None, :]
    mask_Sx1xC = index <= positions[:, None, None]
    if model.config.sliding_window is not None:
        mask_Sx1xC &= positions[:, None, None] - index < model.config.sliding_window

    def attend(q, k, v, state):
        layer, cache = state
        cache = {
            "k": cache["k"].at[layer, slots, positions].set(k[:, 0].astype(cache["k"].dtype)),
            "v": cache["v"].at[layer, slots, positions].set(v[:, 0].astype(cache["v"].dtype)),
        }
        k, v = (jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False) for name in ("k", "v"))
        return masked_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask_Sx1xC), (layer, cache)

    stacked, block = net.split_layers()

    def layer(carry, inputs):
        x, cache = carry
        number, params = inputs
        x, (_, cache) = block(params)(x, rope, attend, (number, cache))
        return (x, cache), None

    x = net.embed(tokens, model.compute_dtype)
    numbers = jnp.arange(model.config.num_layers)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (numbers, stacked))
    return logprobs.head_logits(net.normalize(x), net.head_weights()), cache
