"""The network: a pre-norm decoder of Flax NNX modules, written once for training, prefill and decode.

Every parameter is declared by its logical axes alone; its shape follows from the config. Matrices lie as in the
checkpoint, `[out, in]`, so that loading and exporting are reshapes. The layers' parameters are stacked along a leading
`layers` axis and scanned. What differs between training and generation, how a query finds its keys, is an argument of
the block (`attend`), not another block.

Shapes: B rows, T tokens, M = B T, D model width, N query heads, K key/value heads, H head size, F feed-forward width.
Between attentions the tokens of all rows are one axis M: XLA's CPU code is twice as fast on matrices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from areal_jax.models import moe
from areal_jax.models.config import ModelConfig, ModelError, Rope
from areal_jax.models.precision import precision_of
from areal_jax.models.sharding import ANYWHERE, Place, on_gpu

# (q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, state) -> (out_BxTxNxH, state): how a query finds its keys.
Attend = Callable[[jax.Array, jax.Array, jax.Array, object], tuple[jax.Array, object]]
# The experts' products, for networks that have experts: `moe.dense` or what `moe.grouped` returns.
Mix = Callable[..., jax.Array]


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): y += (alpha / rank) B A x, on the named projections."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ModelError(f"adapters of rank {self.rank} are none; use 1 or more")
        if not self.targets or (unknown := sorted(set(self.targets) - set(PROJECTIONS))):
            found = ", ".join(unknown) if self.targets else "nothing"
            raise ModelError(f"adapters on {found}: the projections are called {', '.join(PROJECTIONS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Maker:
    """Creates parameters from their logical axes; the one place where sizes, dtype and initial values meet."""

    def __init__(self, config: ModelConfig, lora: Lora | None, rng: jax.Array):
        self.config, self.lora, self.rng, self.made = config, lora, rng, 0
        self.sizes = {
            "layers": config.num_layers,
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "mlp": config.mlp_size,
            "expert": config.num_experts,
            "expert_mlp": config.expert_mlp_size,
            "lora": lora.rank if lora else 0,
        }

    def __call__(self, *axes: str, init: str = "normal") -> nnx.Param:
        shape = tuple(self.sizes[axis] for axis in axes)
        self.made += 1
        if init == "normal":
            key = jax.random.fold_in(self.rng, self.made)
            value = self.config.init_std * jax.random.normal(key, shape, jnp.float32)
        else:
            value = jnp.full(shape, 1.0 if init == "ones" else 0.0, jnp.float32)
        return nnx.Param(value, axes=axes)


def contract(x: jax.Array, w: jax.Array, n: int) -> jax.Array:
    """Contracts the last `n` axes of `x` with the last `n` axes of `w`; the result has x's other axes, then w's."""
    axes = (tuple(range(x.ndim - n, x.ndim)), tuple(range(w.ndim - n, w.ndim)))
    return jax.lax.dot_general(x, w.astype(x.dtype), (axes, ((), ())), precision=precision_of(x))


class Linear(nnx.Module):
    """y = W x (+ b) (+ scale B A x), over one or two axes in and out; weights are cast to the dtype of x."""

    def __init__(self, make: Maker, name: str, out: tuple[str, ...], into: tuple[str, ...], bias: bool = False):
        self.inputs = len(into)
        self.kernel = make("layers", *out, *into)
        self.bias = make("layers", *out, init="zeros") if bias else None
        adapted = make.lora is not None and name in make.lora.targets
        self.scale = make.lora.scale if adapted else None
        self.lora_a = make("layers", "lora", *into) if adapted else None
        self.lora_b = make("layers", *out, "lora", init="zeros") if adapted else None

    def __call__(self, x: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """The result; `y` is W x, where the caller has it."""
        y = contract(x, self.kernel[...], self.inputs) if y is None else y
        if self.lora_a is not None:
            low = contract(x, self.lora_a[...], self.inputs)
            y += contract(low, self.lora_b[...], 1) * jnp.asarray(self.scale, y.dtype)
        if self.bias is not None:
            y += broadcast(self.bias[...].astype(y.dtype), y)
        return y


def broadcast(w: jax.Array, like: jax.Array) -> jax.Array:
    """`w` with leading axes of one, to the rank of `like`."""
    return w.reshape((1,) * (like.ndim - w.ndim) + w.shape)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis; the statistics in float32, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * broadcast(scale.astype(x.dtype), x)


def rope_angles(positions: jax.Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 `[..., H/2]`, of the rotary embedding at integer `positions`.

    Llama 3's scaling leaves short wavelengths alone, divides long ones by `factor`, and blends in between
    (https://arxiv.org/abs/2407.21783; the numbers are those of the checkpoint's config).
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freqs = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        freqs = freqs / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_position * freqs / (2 * jnp.pi)  # full turns within the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        freqs = blend * freqs + (1 - blend) * freqs / rope.factor
    elif rope.kind != "default":
        raise ModelError(f"rope kind {rope.kind!r} is not implemented")
    angles = positions.astype(jnp.float32)[..., None] * broadcast(freqs, positions[..., None])
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotation in float32; first and second half of the head form the pairs, as in the checkpoints."""
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with optional biases and q/k norms; how keys are found is the caller's `attend`."""

    def __init__(self, make: Maker):
        c = make.config
        self.config = c
        self.q = Linear(make, "q", ("heads", "head_dim"), ("embed",), c.qkv_bias)
        self.k = Linear(make, "k", ("kv_heads", "head_dim"), ("embed",), c.qkv_bias)
        self.v = Linear(make, "v", ("kv_heads", "head_dim"), ("embed",), c.qkv_bias)
        self.o = Linear(make, "o", ("embed",), ("heads", "head_dim"), c.output_bias)
        self.q_norm = make("layers", "head_dim", init="ones") if c.qk_norm else None
        self.k_norm = make("layers", "head_dim", init="ones") if c.qk_norm else None

    def __call__(self, x_MxD, rope, attend: Attend, state):
        rows = rope[0].shape[:2]
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxH = (
            f(x_MxD).reshape(*rows, -1, self.config.head_dim) for f in (self.q, self.k, self.v)
        )
        if self.config.qk_norm:
            q_BxTxNxH = rms_norm(q_BxTxNxH, self.q_norm[...], self.config.norm_eps)
            k_BxTxKxH = rms_norm(k_BxTxKxH, self.k_norm[...], self.config.norm_eps)
        q_BxTxNxH = checkpoint_name(rotate(q_BxTxNxH, rope), "qkv")
        k_BxTxKxH = checkpoint_name(rotate(k_BxTxKxH, rope), "qkv")
        v_BxTxKxH = checkpoint_name(v_BxTxKxH, "qkv")
        with jax.named_scope("attend"):
            out_BxTxNxH, state = attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, state)
        out_BxTxNxH = checkpoint_name(out_BxTxNxH, "attention_out")
        return self.o(out_BxTxNxH.reshape(-1, *out_BxTxNxH.shape[2:])), state


class Mlp(nnx.Module):
    """The gated feed-forward layer: down(silu(gate x) * up x)."""

    def __init__(self, make: Maker):
        self.gate = Linear(make, "gate", ("mlp",), ("embed",))
        self.up = Linear(make, "up", ("mlp",), ("embed",))
        self.down = Linear(make, "down", ("embed",), ("mlp",))

    def __call__(self, x: jax.Array, mix: Mix) -> jax.Array:
        if on_gpu() and len(x) > x.shape[-1]:  # enough tokens to pay for a copy of the matrices
            # One product, the rows of both in turn: then XLA takes both gradients in one pass over memory, too.
            kernel_Fx2xD = jnp.stack([w.kernel[...].astype(x.dtype) for w in (self.gate, self.up)], axis=1)
            both_MxFx2 = checkpoint_name(contract(x, kernel_Fx2xD, 1), "mlp_gate_up")
            gate, up = self.gate(x, both_MxFx2[..., 0]), self.up(x, both_MxFx2[..., 1])
        else:
            gate, up = (checkpoint_name(w(x), "mlp_gate_up") for w in (self.gate, self.up))
        return self.down(jax.nn.silu(gate) * up)


class Experts(nnx.Module):
    """A router and its feed-forward experts; every token passes through its `experts_per_token` best."""

    def __init__(self, make: Maker):
        self.config = make.config
        self.router = make("layers", "expert", "embed")
        self.gate = make("layers", "expert", "expert_mlp", "embed")
        self.up = make("layers", "expert", "expert_mlp", "embed")
        self.down = make("layers", "expert", "embed", "expert_mlp")

    def __call__(self, x_MxD: jax.Array, mix: Mix) -> jax.Array:
        c = self.config
        indices, weights = moe.route(
            x_MxD, self.router[...], top_k=c.experts_per_token, renormalize=c.renormalize_router
        )
        return mix(x_MxD, indices, weights, self.gate[...], self.up[...], self.down[...])


class Block(nnx.Module):
    """One layer: x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, make: Maker):
        self.eps = make.config.norm_eps
        self.attention_norm = make("layers", "embed", init="ones")
        self.attention = Attention(make)
        self.mlp_norm = make("layers", "embed", init="ones")
        self.mlp = Experts(make) if make.config.num_experts else Mlp(make)

    def __call__(self, x_MxD, rope, attend: Attend, state, mix: Mix = moe.dense):
        with jax.named_scope("attention"):
            out, state = self.attention(rms_norm(x_MxD, self.attention_norm[...], self.eps), rope, attend, state)
            x_MxD = x_MxD + out
        with jax.named_scope("mlp"):
            x_MxD = x_MxD + self.mlp(rms_norm(x_MxD, self.mlp_norm[...], self.eps), mix)
        return x_MxD, state


class Decoder(nnx.Module):
    """Embedding, the stack of layers, the final norm, and the head (the embedding itself where it is tied)."""

    def __init__(self, config: ModelConfig, lora: Lora | None, rng: jax.Array):
        make = Maker(config, lora, rng)
        self.config = config
        self.embedding = make("vocab", "embed")
        self.layers = Block(make)
        self.final_norm = make("embed", init="ones")
        self.head = None if config.tie_embeddings else make("vocab", "embed")

    def embed(self, tokens_M: jax.Array, dtype, place: Place = ANYWHERE) -> jax.Array:
        return place.rows(self.embedding[...], tokens_M).astype(dtype)

    def rope(self, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_angles(positions_BxT, self.config.head_dim, self.config.rope)

    def split_layers(self):
        """The stacked layers as (parameters with a leading layer axis, a function from one slice to its Block)."""
        graphdef, stacked = nnx.split(self.layers, nnx.Param, graph=False)
        return nnx.to_pure_dict(stacked), lambda one: nnx.merge(graphdef, one)

    def normalize(self, x_MxD: jax.Array) -> jax.Array:
        return rms_norm(x_MxD, self.final_norm[...], self.config.norm_eps)

    def head_weights(self) -> jax.Array:
        """`[V, D]`, in the parameters' dtype."""
        return self.embedding[...] if self.head is None else self.head[...]
