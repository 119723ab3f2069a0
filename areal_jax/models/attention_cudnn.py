"""Packed flash attention through cuDNN: the only file that touches jax's private call, by keyword.

The public `jax.nn.dot_product_attention` has no packed layout; the private function beneath it has. It takes, for each
row, where its segments start and how long they are. `docs/models.md` says what to do when a jax release moves it.
"""

import math

import jax
import jax.numpy as jnp

from areal_jax.models.config import ModelError
from areal_jax.models.sharding import Place, on_gpu

FIRST_RIGHT_JAX = (0, 11, 1)  # before, the key offsets of grouped-query attention were scaled by the query heads
FORWARD_PRIMITIVE = "dot_product_attention_fwd"  # whose outputs a remat policy saves, so that it runs once


def require(dtype, *, heads: int, kv_heads: int, head_dim: int, jax_version: tuple[int, ...] | None = None) -> None:
    """Checks that the packed call runs here and is right.

    Raises:
      ModelError: it is not; the message says why and what to do.
    """
    version = jax.__version_info__ if jax_version is None else jax_version
    if heads != kv_heads and version[:3] < FIRST_RIGHT_JAX:
        raise ModelError(
            f"packed cuDNN attention with grouped queries ({heads} heads on {kv_heads}) gives wrong numbers in "
            f"jax {'.'.join(map(str, version))}; install jax >= {'.'.join(map(str, FIRST_RIGHT_JAX))}, "
            "or use attention='xla'"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ModelError(f"cuDNN attention needs bfloat16 or float16, not {jnp.dtype(dtype)}; set compute_dtype")
    if head_dim % 8 or head_dim > 256:
        raise ModelError(f"cuDNN attention needs a head_dim that is a multiple of 8 up to 256, not {head_dim}")
    gpus = jax.local_devices() if on_gpu() else []
    capability = str(getattr(gpus[0], "compute_capability", "")) if gpus else ""  # "9.0"; other makers write names
    if not capability[:1].isdigit() or float(capability) < 9.0:
        raise ModelError("packed cuDNN attention needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later")


def segment_table(segment_ids: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths and starts of the segments of packed rows, and whether they fit.

    Args:
      segment_ids: int32 `[B, T]`; a segment is a run of one nonzero id.
      max_segments: M.

    Returns:
      `(lengths, starts, fits)`: int32 `[B, M]` and `[B, M + 1]`, -1 where there is no segment; bool `[B]`, false
      where a row has more than M segments.
    """
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    after = jnp.pad(segment_ids, ((0, 0), (0, 1)))[:, 1:]
    first = (segment_ids != 0) & (segment_ids != before)
    last = (segment_ids != 0) & (segment_ids != after)

    def positions(flags):
        return jnp.nonzero(flags, size=max_segments, fill_value=-1)[0].astype(jnp.int32)

    starts = jax.vmap(positions)(first)
    ends = jax.vmap(positions)(last)
    lengths = jnp.where(starts >= 0, ends - starts + 1, -1)
    fits = jnp.sum(first, axis=1) <= max_segments
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), fits


def attention(q, k, v, segment_ids, *, window: int | None, max_segments: int, place: Place) -> jax.Array:
    """Causal attention inside each segment; arguments and result as in `attention.attention`.

    The kernel neither reads nor writes padding, so what it leaves there, forward and backward, is replaced by zero.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    rows, length, kv_heads, size = place.shard_shape(k.shape, "batch", None, "kv_heads", None)
    mine = rows, length, kv_heads * (q.shape[2] // k.shape[2]), size  # queries are split as their keys are
    if math.prod(mine) >= 2**31:  # jax computes the offsets of segments in int32
        raise ModelError(f"queries of shape {list(mine)} on one device are too many for cuDNN; use fewer trainer.rows")
    max_segments = max(2, max_segments)  # the private call takes offsets into account from two segments on
    lengths, starts, fits = segment_table(segment_ids, max_segments)
    # On a mesh each device calls the kernel for its own rows, and must be given the tables of those rows alone.
    lengths, starts = place(lengths, "batch", None), place(starts, "batch", None)
    real = (segment_ids != 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    out = cudnn.dot_product_attention(
        query=q,
        key=k,
        value=v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
        sliding_window_length=window,
    )
    clean = jnp.where(real, out, jnp.zeros((), out.dtype))
    return _replace(out, jnp.where(fits[:, None, None, None], clean, jnp.full((), jnp.nan, out.dtype)))


@jax.custom_vjp
def _replace(x, value):
    """`value`, but its gradient is that of `x`, untouched: the kernel does not read it where they differ."""
    return value


_replace.defvjp(lambda x, value: (value, None), lambda _, gradient: (gradient, jnp.zeros_like(gradient)))
