"""Mixture of experts: each token gets the weighted sum of its best experts. No capacity, nothing is dropped.

The router is one function; the experts' products are another, with two implementations. `dense` runs every expert on
every token and gives the unchosen ones weight zero: exact on any device, E / top_k times the arithmetic, the oracle.
`grouped` sorts tokens by expert and multiplies groups (`jax.lax.ragged_dot`): the arithmetic of the chosen experts
alone.

Shapes: M tokens, k experts per token, E experts, D model width, F width of an expert.
"""

import functools

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
        args = (x, indices, weights, gate.astype(x.dtype), up.astype(x.dtype), down.astype(x.dtype))
        mesh = place.mesh
        if mesh is None or mesh.size == 1:
            return _groups(*args, jnp.int32(0)).astype(x.dtype)
        batch = PartitionSpec(*partition_spec(mesh, ("batch", None), x.shape, place.rules))
        wide = partition_spec(mesh, ("expert", "expert_mlp", None), gate.shape, place.rules)
        narrow = partition_spec(mesh, ("expert", None, "expert_mlp"), down.shape, place.rules)
        split = tuple(axis for axis in (wide[0], wide[1]) if axis)

        def local(x, indices, weights, gate, up, down):
            first = jax.lax.axis_index(wide[0]) * gate.shape[0] if wide[0] else jnp.int32(0)
            # Each device makes its own use of the tokens, so their gradient is the sum over devices: say so explicitly.
            x, weights = (jax.lax.pcast(a, split, to="varying") if split else a for a in (x, weights))
            part = _groups(x, indices, weights, gate, up, down, first)
            return (jax.lax.psum(part, split) if split else part).astype(x.dtype)

        specs = (batch, batch, batch, wide, wide, narrow)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=batch)(*args)

    return run


def _groups(x, indices, weights, gate, up, down, first):
    """The share of experts `first ...` in each token's sum, float32 `[M, D]`."""
    (tokens, width), (experts, top_k) = x.shape, (gate.shape[0], indices.shape[-1])
    expert = indices.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)  # those of other devices come last
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    mine = (expert[order] < experts)[:, None]
    token = jnp.where(mine, x[order // top_k], jnp.zeros((), x.dtype))

    def product(a, w):
        return jax.lax.ragged_dot(a, jnp.swapaxes(w, 1, 2), sizes, precision=precision_of(a))

    out = product(jax.nn.silu(product(token, gate)) * product(token, up), down).astype(jnp.float32)
    out = jnp.where(mine, out * weights.reshape(-1)[order][:, None], 0.0)
    back = jnp.argsort(order)
    return jnp.sum(out[back].reshape(tokens, top_k, width), axis=1)
