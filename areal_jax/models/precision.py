"""Float32 means float32: by default a GPU would round the factors of a float32 product to 10 bits (TF32)."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """The `precision` of a product with `x`; its gradients have the same."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
