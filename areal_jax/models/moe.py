"""Mixture of experts: each token gets the weighted sum of its best experts. No capacity, nothing is dropped.

The router is one function; the experts' products are another, with two implementations. `dense` runs every expert on
every token and gives the unchosen ones weight zero: exact on any device, E / top_k times the arithmetic, the oracle.
`grouped` multiplies blocks of tokens that chose one expert: the arithmetic of the chosen experts, and some padding.
(`jax.lax.ragged_dot` is not it: XLA makes a dense product of it on NVIDIA GPUs, of all experts for every pair.)

Shapes: M tokens, k experts per token, E experts, D model width, F width of an expert.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from areal_jax.models.precision import precision_of
from areal_jax.models.sharding import Place, partition_spec

IMPLEMENTATIONS = ("auto", "dense", "grouped")


def route(x_MxD: jax.Array, router_ExD: jax.Array, *, top_k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights: `(indices int32 [M, top_k], weights float32 [M, top_k])`.

    The softmax runs over all experts in float32, then the `top_k` largest are kept; with `renormalize` they sum to one.
    """
    router_ExD = router_ExD.astype(x_MxD.dtype)
    logits_MxE = jnp.einsum(
        "md,ed->me", x_MxD, router_ExD, precision=precision_of(x_MxD), preferred_element_type=jnp.float32
    )
    weights, indices = jax.lax.top_k(jax.nn.softmax(logits_MxE, axis=-1), top_k)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return indices, weights


def dense(x_MxD, indices_Mxk, weights_Mxk, gate_ExFxD, up_ExFxD, down_ExDxF) -> jax.Array:
    """All experts on all tokens, weighted; returns `[M, D]`."""
    experts = jnp.arange(gate_ExFxD.shape[0], dtype=indices_Mxk.dtype)[None, None]
    weights_MxE = jnp.sum(jnp.where(indices_Mxk[..., None] == experts, weights_Mxk[..., None], 0.0), axis=1)
    gate, up, down = (w.astype(x_MxD.dtype) for w in (gate_ExFxD, up_ExFxD, down_ExDxF))
    einsum = functools.partial(jnp.einsum, precision=precision_of(x_MxD))
    hidden_MxExF = jax.nn.silu(einsum("md,efd->mef", x_MxD, gate)) * einsum("md,efd->mef", x_MxD, up)
    return einsum("mef,edf->md", hidden_MxExF * weights_MxE.astype(x_MxD.dtype)[..., None], down)


def grouped(place: Place):
    """The same result from the chosen experts alone; on a mesh, experts and their width are split, tokens stay put.

    Each device runs its own experts on the tokens of its part of the batch; the parts of a token's sum meet in one
    reduction.
    """

    def run(x, indices, weights, gate, up, down):
        axes = ("expert", "expert_mlp", "embed"), ("expert", "expert_mlp", "embed"), ("expert", "embed", "expert_mlp")
        # Their own sharding before and after, or the partitioner gathers them in float32, and too early.
        matrices = [place(place(w, *a).astype(x.dtype), *a) for w, a in zip((gate, up, down), axes)]
        args, mesh = (x, indices, weights, *matrices), place.mesh
        if mesh is None or mesh.size == 1:
            return _blocks(*args).astype(x.dtype)
        batch = PartitionSpec(*partition_spec(mesh, ("batch", None), x.shape, place.rules))
        wide = partition_spec(mesh, ("expert", "expert_mlp", None), gate.shape, place.rules)
        narrow = partition_spec(mesh, ("expert", None, "expert_mlp"), down.shape, place.rules)
        split = tuple(axis for axis in (wide[0], wide[1]) if axis)
        rows = batch[0] if isinstance(batch[0], tuple) else (batch[0],) if batch[0] else ()

        def local(x, indices, weights, *matrices):
            # Each device makes its own use of its inputs, so their gradients are sums over devices: say so explicitly.
            x, indices, weights = (_varying(a, split) for a in (x, indices, weights))
            matrices = (_varying(a, rows) for a in matrices)
            first = jax.lax.axis_index(wide[0]) * (gate.shape[0] // mesh.shape[wide[0]]) if wide[0] else 0
            part = _blocks(x, indices, weights, *matrices, first, mesh.shape[wide[0]] if wide[0] else 1)
            return (jax.lax.psum(part, split) if split else part).astype(x.dtype)

        specs = (batch, batch, batch, wide, wide, narrow)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch)(*args)

    return run


def _varying(x, axes):
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def block_shape(pairs: int, experts: int, shards: int = 1) -> tuple[int, int]:
    """`(blocks, rows of a block)` of a device that has one of `shards` equal parts of the experts, for so many pairs of
    token and expert: enough, however they choose.

    Longer blocks are padded more, shorter ones read their expert's weights more often. A GPU does some 400 operations
    in the time of moving a byte, and a weight is two bytes, read and written: the sum is least near this length.
    """
    rows = 64 * max(1, round(20 * math.sqrt(pairs / experts) / 64))
    return -(-(pairs // rows + experts // shards) // shards) * shards, rows


def _blocks(x_MxD, indices_Mxk, weights_Mxk, gate, up, down, first=0, shards: int = 1):
    """The share of experts `first ...` in each token's sum, float32 `[M, D]`; they are one of `shards` equal parts.

    Rows, one for each pair of token and expert, are laid out expert by expert, each expert's in whole blocks of S rows,
    and each block is multiplied with its expert's weights: one batched product, of a shape that no routing changes.
    """
    (tokens, top_k), experts = indices_Mxk.shape, gate.shape[0]
    blocks, size = block_shape(tokens * top_k, experts * shards, shards)
    slot_Mxk, expert_of_block = _layout(indices_Mxk - first, experts, size, blocks)
    token_of_slot = jnp.full(blocks * size, tokens, jnp.int32)
    token_of_slot = token_of_slot.at[slot_Mxk].set(jnp.arange(tokens, dtype=jnp.int32)[:, None], mode="drop")

    def feed_forward(x_BxSxD, expert):
        hidden = jax.nn.silu(_product(x_BxSxD, gate, expert)) * _product(x_BxSxD, up, expert)
        return _product(hidden, down, expert)

    x_BxSxD = _to_slots(x_MxD, token_of_slot, slot_Mxk).reshape(blocks, size, -1)
    out_BxSxD = _used_parts(feed_forward, shards, experts, x_BxSxD, expert_of_block)
    return _from_slots(out_BxSxD.reshape(blocks * size, -1), weights_Mxk, token_of_slot, slot_Mxk)


def _layout(experts_Mxk, experts: int, size: int, blocks: int):
    """`(slot int32 [M, k], expert_of_block int32 [blocks])`: the row of each pair, `blocks * size` for the pairs of
    experts elsewhere; and the expert of each block, `experts` for unused ones, which come last."""
    expert = experts_Mxk.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
    order = jnp.argsort(expert, stable=True)
    count = jnp.sum(expert[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    block_end = jnp.cumsum(-(-count // size))
    first_slot = (block_end - -(-count // size)) * size
    shift = first_slot - (jnp.cumsum(count) - count)  # from the place among the sorted pairs to the slot
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    slot = jnp.where(expert < experts, place + jnp.take(shift, expert, mode="clip"), blocks * size)
    expert_of_block = jnp.searchsorted(block_end, jnp.arange(blocks, dtype=block_end.dtype), side="right")
    return slot.reshape(experts_Mxk.shape), expert_of_block.astype(jnp.int32)


def _used_parts(f, parts: int, experts: int, x_BxSxD, expert_of_block):
    """`f` of all blocks, in so many parts, leaving out parts without a used block: with experts on other devices most
    pairs are not here, but all could be."""
    if parts == 1:
        return f(x_BxSxD, expert_of_block)

    def one(_, part):
        x, expert = part
        return None, jax.lax.cond(expert[0] < experts, f, lambda x, expert: jnp.zeros_like(x), x, expert)

    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (x_BxSxD, expert_of_block))
    return jax.lax.scan(one, None, split)[1].reshape(x_BxSxD.shape)


@jax.custom_vjp
def _product(x_BxSxI, w_ExOxI, expert_of_block):
    """Each block times the weights of its expert, `[B, S, O]`."""
    w_BxOxI = jnp.take(w_ExOxI, expert_of_block, axis=0, mode="clip")
    return jnp.einsum("bsi,boi->bso", x_BxSxI, w_BxOxI, precision=precision_of(x_BxSxI))


def _product_forward(x, w, expert_of_block):
    return _product(x, w, expert_of_block), (x, w, expert_of_block)  # not the copies of the weights


def _product_backward(residuals, d_out_BxSxO):
    x, w, expert_of_block = residuals
    # Copied again: XLA would keep the forward's copies, of all layers at once.
    w_BxOxI = jnp.take(w, jax.lax.optimization_barrier(expert_of_block), axis=0, mode="clip")
    einsum = functools.partial(jnp.einsum, precision=precision_of(x))
    d_x = einsum("bso,boi->bsi", d_out_BxSxO, w_BxOxI)
    of_blocks = einsum("bso,bsi->boi", d_out_BxSxO, x, preferred_element_type=jnp.float32)
    # A zero of its own: XLA would make the zeros of all layers at once.
    zero, of_blocks = jax.lax.optimization_barrier((jnp.zeros((), jnp.float32), of_blocks))
    d_w = jnp.full_like(w, zero, jnp.float32).at[expert_of_block].add(of_blocks, indices_are_sorted=True, mode="drop")
    return d_x, d_w.astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _to_slots(x_MxD, token_of_slot, slot_Mxk):
    """`[slots, D]`: each slot its token's row, or zeros. The gradient gathers, too, where XLA's own would scatter."""
    return jnp.take(x_MxD, token_of_slot, axis=0, mode="fill", fill_value=0)


def _to_slots_backward(residuals, d_rows):
    slot_Mxk, like = residuals
    d_x = jnp.take(d_rows, slot_Mxk, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.sum(d_x, axis=1).astype(like.dtype), None, None


_to_slots.defvjp(lambda x, token, slot: (_to_slots(x, token, slot), (slot, x[:0])), _to_slots_backward)


@jax.custom_vjp
def _from_slots(rows_SxD, weights_Mxk, token_of_slot, slot_Mxk):
    """`[M, D]`, float32: each token's weighted sum of its slots' rows; what is elsewhere counts as zero."""
    rows_MxkxD = jnp.take(rows_SxD, slot_Mxk, axis=0, mode="fill", fill_value=0)
    return jnp.sum(rows_MxkxD.astype(jnp.float32) * weights_Mxk[..., None], axis=1)


def _from_slots_forward(rows, weights, token_of_slot, slot):
    return _from_slots(rows, weights, token_of_slot, slot), (rows, weights, token_of_slot, slot)


def _from_slots_backward(residuals, d_out_MxD):
    rows, weights, token_of_slot, slot = residuals
    weight_of_slot = jnp.zeros(len(rows), weights.dtype).at[slot].set(weights, mode="drop")
    d_rows = jnp.take(d_out_MxD, token_of_slot, axis=0, mode="fill", fill_value=0) * weight_of_slot[:, None]
    rows_MxkxD = jnp.take(rows, slot, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    return d_rows.astype(rows.dtype), jnp.sum(rows_MxkxD * d_out_MxD[:, None], axis=-1), None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)
