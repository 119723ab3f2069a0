"""The cached forward for generation: prompts are prefilled into slots, then all slots advance one token per step.

The cache is `{"k", "v"}`, each a tuple with an array for every layer: k `[slots, kv_heads, head_dim, length]`, v
`[slots, kv_heads, length, head_dim]`, as the products of a single query read them. It is updated in place, so a jitted
caller should donate it. Nothing here loops over stacked layers, as training does: taking a layer's part out of a
stacked array copies it, which costs a decode step more than its attention, and for parameters more memory than the
cache. Who generates much gives them as `unstack_layers` makes them. A slot's result depends on that slot alone,
whatever the others hold. The layers are those of the training forward; only how a query finds its keys differs.
"""

import functools

import jax
import jax.numpy as jnp

from areal_jax.models import logprobs
from areal_jax.models.attention import MASKED, attention
from areal_jax.models.config import ModelError
from areal_jax.models.precision import precision_of

Cache = dict[str, tuple[jax.Array, ...]]


def unstack_layers(params):
    """The same parameters with a tree for each layer, in a tuple, instead of arrays stacked along a leading axis.

    Both forms do for `prefill` and `step`. Stacked ones are copied layer by layer each time.
    """
    leaves, tree = jax.tree.flatten(params["layers"])
    return params | {"layers": tuple(jax.tree.unflatten(tree, one) for one in zip(*leaves, strict=True))}


def _layers(model, params):
    """(the network but for its layers, the layers' parameters one by one, a function from these to a block)."""
    if not isinstance(params["layers"], tuple):
        params = unstack_layers(params)
    net = model._network(params | {"layers": params["layers"][0]})
    return net, params["layers"], net.split_layers()[1]


def init_cache(model, slots: int, length: int, dtype=None) -> Cache:
    """Zeros for `slots` sequences of at most `length` tokens; dtype defaults to the model's compute dtype."""
    c, dtype = model.config, jnp.dtype(dtype or model.compute_dtype)
    shapes = {"k": (slots, c.num_kv_heads, c.head_dim, length), "v": (slots, c.num_kv_heads, length, c.head_dim)}
    return {name: tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers)) for name, shape in shapes.items()}


def insert_cache(cache: Cache, part: Cache, slots) -> Cache:
    """Writes `part`, a cache of N slots that is not longer, into int32 `[N]` `slots`; out of range: nowhere."""
    width = _length(part)
    return {
        "k": tuple(x.at[slots, :, :, :width].set(new, mode="drop") for x, new in zip(cache["k"], part["k"])),
        "v": tuple(x.at[slots, :, :width].set(new, mode="drop") for x, new in zip(cache["v"], part["v"])),
    }


def resize_cache(cache: Cache, length: int) -> Cache:
    """The cache cut, or padded with zeros, to `length`."""
    more = (0, max(0, length - _length(cache)))
    return {
        "k": tuple(jnp.pad(x[..., :length], ((0, 0), (0, 0), (0, 0), more)) for x in cache["k"]),
        "v": tuple(jnp.pad(x[..., :length, :], ((0, 0), (0, 0), more, (0, 0))) for x in cache["v"]),
    }


def _length(cache: Cache) -> int:
    return cache["v"][0].shape[2]


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
    capacity, length, dtype = cache["v"][0].shape[0], _length(cache), cache["v"][0].dtype
    if width > length:
        raise ModelError(f"prompts padded to {width} tokens do not fit a cache of {length} tokens per slot")
    (net, layers, block), index = _layers(model, params), jnp.arange(width, dtype=jnp.int32)[None]
    segment_ids = (index < lengths[:, None]).astype(jnp.int32)
    rope = net.rope(jnp.broadcast_to(index, tokens.shape))

    def attend(q, k, v, state):
        out = attention(q, k, v, segment_ids, window=model.config.sliding_window, implementation="xla")
        return out, (k.transpose(0, 2, 3, 1).astype(dtype), v.swapaxes(1, 2).astype(dtype))

    x_MxD, written = net.embed(tokens.reshape(-1), model.compute_dtype), []
    for layer in layers:
        x_MxD, keys_values = block(layer)(x_MxD, rope, attend, None)
        written.append(keys_values)
    keys, values = zip(*written)
    last_NxD = x_MxD[jnp.arange(len(lengths)) * width + jnp.maximum(lengths - 1, 0)]
    logits = logprobs.head_logits(net.normalize(last_NxD), net.head_weights())

    # Out of range means "do not write"; negative indices would count from the end, so they are mapped too.
    target = jnp.where((lengths > 0) & (slots >= 0) & (slots < capacity), slots, capacity)
    return logits, insert_cache(cache, {"k": keys, "v": values}, target)


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
    (net, layers, block), slots = _layers(model, params), jnp.arange(tokens.shape[0])
    rope = net.rope(positions[:, None])
    distance = positions[:, None] - jnp.arange(_length(cache))[None]
    visible_SxC = distance >= 0
    if model.config.sliding_window is not None:
        visible_SxC &= distance < model.config.sliding_window

    def attend(q, k, v, state):
        keys, values = state
        keys = keys.at[slots, :, :, positions].set(k[:, 0].astype(keys.dtype))
        values = values.at[slots, :, positions].set(v[:, 0].astype(values.dtype))
        return _one_query(q, keys.astype(q.dtype), values.astype(q.dtype), visible_SxC), (keys, values)

    x, written = net.embed(tokens, model.compute_dtype), []
    for layer, *state in zip(layers, cache["k"], cache["v"], strict=True):
        x, state = block(layer)(x, rope, attend, state)
        written.append(state)
    keys, values = zip(*written)
    return logprobs.head_logits(net.normalize(x), net.head_weights()), {"k": keys, "v": values}


def _one_query(q_Sx1xNxH, k_SxKxHxC, v_SxKxCxH, visible_SxC):
    """Softmax attention of one query per slot over the visible part of its keys."""
    slots, kv_heads, size, _ = k_SxKxHxC.shape
    q_SxKxGxH = q_Sx1xNxH.reshape(slots, kv_heads, -1, size)
    einsum = functools.partial(jnp.einsum, precision=precision_of(q_SxKxGxH))
    scores = einsum("skgh,skhc->skgc", q_SxKxGxH, k_SxKxHxC, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_SxC[:, None, None], scores * size**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_SxKxCxH.dtype)
    return einsum("skgc,skch->skgh", weights, v_SxKxCxH).reshape(q_Sx1xNxH.shape)
