"""Low-rank adapters as part of the parameter tree: added beside the kernels, trained alone, merged on export.

`model.with_(lora=Lora(rank))` describes a network whose projections have `lora_a` and `lora_b` leaves beside `kernel`.
"""

import jax
import jax.numpy as jnp

from areal_jax.models.config import ModelError
from areal_jax.models.tables import flatten, unflatten

ADAPTER = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
    """Whether a flattened parameter path names an adapter."""
    return path.rsplit("/", 1)[-1] in ADAPTER


def trainable(model, params) -> dict:
    """A tree of booleans like `params`: what an optimizer should update (adapters alone if there are any)."""
    return unflatten({path: model.lora is None or is_adapter(path) for path in flatten(params)})


def merge(model, params) -> dict:
    """The parameters of the same network without adapters: kernel + scale B A, computed in float32."""
    if model.lora is None:
        return params
    flat = flatten(params)
    merged = {path: value for path, value in flat.items() if not is_adapter(path)}
    for path, a in flat.items():
        if path.endswith("/lora_a"):
            stem = path.removesuffix("/lora_a")
            merged[f"{stem}/kernel"] = _merge_one(flat[f"{stem}/kernel"], a, flat[f"{stem}/lora_b"], model.lora.scale)
    return unflatten(merged)


@jax.jit
def _merge_one(kernel, a, b, scale):
    if a.shape[0] != kernel.shape[0]:
        raise ModelError(f"adapter of {a.shape[0]} layers beside a kernel of {kernel.shape[0]}")
    # [L, out..., r] x [L, r, in...] -> [L, out..., in...]
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    update = jax.lax.dot_general(b32, a32, (((b.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)
