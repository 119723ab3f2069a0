"""Mixture of experts: each token gets the weighted sum of its best experts. No capacity, nothing is dropped."""

import jax
import jax.numpy as jnp


def route(x_MxD: jax.Array, router_ExD: jax.Array, *, top_k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights: `(indices int32 [M, top_k], weights float32 [M, top_k])`.

    The softmax runs over all experts in float32, then the `top_k` largest are kept; with `renormalize` they sum to one.
    """
    logits_MxE = jnp.einsum("md,ed->me", x_MxD, router_ExD.astype(x_MxD.dtype), preferred_element_type=jnp.float32)
    weights, indices = jax.lax.top_k(jax.nn.softmax(logits_MxE, axis=-1), top_k)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return indices, weights


def feed_forward(x, router_ExD, gate_ExFxD, up_ExFxD, down_ExDxF, *, top_k: int, renormalize: bool) -> jax.Array:
    """The weighted sum of the chosen experts' gated feed-forward layers; `x` is `[..., D]`, so is the result.

    Every expert sees every token and the unchosen ones get weight zero: plain matrix products that shard over the
    `expert` axis and are exact on any device, at E / top_k times the arithmetic of the chosen experts alone.
    """
    x_MxD = x.reshape(-1, x.shape[-1])
    indices, weights = route(x_MxD, router_ExD, top_k=top_k, renormalize=renormalize)
    experts = jnp.arange(router_ExD.shape[0], dtype=indices.dtype)
    chosen = indices[:, :, None] == experts[None, None, :]
    weights_MxE = jnp.sum(jnp.where(chosen, weights[:, :, None], 0.0), axis=1).astype(x.dtype)
    gate, up, down = (w.astype(x.dtype) for w in (gate_ExFxD, up_ExFxD, down_ExDxF))
    hidden_MxExF = jax.nn.silu(jnp.einsum("md,efd->mef", x_MxD, gate)) * jnp.einsum("md,efd->mef", x_MxD, up)
    out_MxD = jnp.einsum("mef,edf->md", hidden_MxExF * weights_MxE[:, :, None], down)
    return out_MxD.reshape(x.shape)
