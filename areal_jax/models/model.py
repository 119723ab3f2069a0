"""The model: a frozen description (architecture and run-time choices) with pure functions of a parameter tree.

`Model` holds no arrays and is hashable, so it can be closed over or be a static argument of `jax.jit`. The parameters
are a plain tree of nested dicts. The Flax NNX network is split into the two at birth, and merged again only while
tracing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from areal_jax.models import attention as attention_lib
from areal_jax.models import attention_cudnn, decode, logprobs, moe, sharding, tables
from areal_jax.models import lora as lora_lib
from areal_jax.models.config import ModelConfig, ModelError
from areal_jax.models.transformer import Decoder, Lora

Params = dict[str, Any]

# What the backward pass keeps of a layer besides its input; the rest is computed again. "none" computes nothing again.
REMAT = {
    "none": (),
    "full": (),
    "attention": ("attention_out",),
    "attention_qkv": ("qkv", "attention_out"),
    "attention_mlp": ("qkv", "attention_out", "mlp_gate_up"),
}

# A loop over the layers compiles fast, and copies what the backward pass needs into stacked arrays and out again.
LAYERS = ("auto", "loop", "unrolled")


@functools.lru_cache(maxsize=64)
def _blueprint(config: ModelConfig, lora: Lora | None):
    """(graphdef, tree of shapes, tree of logical axes) of the network, without any array."""
    module = nnx.eval_shape(lambda: Decoder(config, lora, jax.random.key(0)))
    graphdef, state = nnx.split(module, nnx.Param, graph=False)
    axes = jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer as pure functions of `params`. Change the run-time choices with `with_`.

    Rows are packed: `tokens`, `positions` and `segment_ids` are int32 `[B, T]`; a segment is contiguous in its row, its
    positions count from 0, and segment id 0 is padding. Logits, log-probs and entropies are float32 always.
    """

    config: ModelConfig
    compute_dtype: Any = "float32"
    attention: str = "auto"  # xla | cudnn | auto: cudnn on an NVIDIA GPU that can, else xla
    max_segments: int = 64  # for cudnn: the most segments in a row; a row with more gives NaN, never a wrong number
    experts: str = "auto"  # dense | grouped | auto: grouped but on CPU, where it saves nothing
    remat: str = "none"  # one of REMAT
    layers: str = "auto"  # loop | unrolled | auto: see `_unrolled`
    lora: Lora | None = None
    mesh: Mesh | None = None
    rules: sharding.Rules = sharding.RULES

    def __post_init__(self):
        object.__setattr__(self, "compute_dtype", jnp.dtype(self.compute_dtype).name)
        if self.remat not in REMAT:
            raise ModelError(f"remat policy {self.remat!r} is unknown; known: {', '.join(REMAT)}")
        if self.attention not in attention_lib.IMPLEMENTATIONS:
            known = ", ".join(attention_lib.IMPLEMENTATIONS)
            raise ModelError(f"attention implementation {self.attention!r} is unknown; known: {known}")
        if self.layers not in LAYERS:
            raise ModelError(f"layers={self.layers!r} is unknown; known: {', '.join(LAYERS)}")
        if self.experts not in moe.IMPLEMENTATIONS:
            raise ModelError(f"experts={self.experts!r} is unknown; known: {', '.join(moe.IMPLEMENTATIONS)}")
        if self.lora and self.config.num_experts and not set(self.lora.targets) & {"q", "k", "v", "o"}:
            raise ModelError(f"adapters on {', '.join(self.lora.targets)}: experts have none; name some of q, k, v, o")

    def with_(self, **changes) -> "Model":
        """The same model with some fields replaced."""
        return dataclasses.replace(self, **changes)

    # -- parameters ------------------------------------------------------------------------------------------------

    def abstract_params(self, param_dtype=jnp.float32) -> Params:
        """The tree of `jax.ShapeDtypeStruct`: the single source for init, sharding, restore and load.

        With a mesh, each entry carries its sharding.
        """
        shapes = _blueprint(self.config, self.lora)[1]
        if self.mesh is None:
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, param_dtype), shapes)
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, param_dtype, sharding=where), shapes, self.param_shardings()
        )

    def logical_axes(self) -> Params:
        """The logical axis names of every parameter, as a tree of tuples of strings."""
        return _blueprint(self.config, self.lora)[2]

    def param_shardings(self) -> Params:
        """The tree of shardings on this model's mesh (which must be set)."""
        if self.mesh is None:
            raise ModelError("param_shardings needs a mesh; use model.with_(mesh=...)")
        return sharding.tree_shardings(
            self.mesh, self.logical_axes(), _blueprint(self.config, self.lora)[1], self.rules
        )

    def init(self, rng: jax.Array, param_dtype=jnp.float32) -> Params:
        """Random parameters: normal with the config's `init_std`, norms one, biases zero; born on their shards.

        The values depend on `rng` alone, not on the mesh.
        """
        return _initializer(self, jnp.dtype(param_dtype).name)(rng)

    def num_params(self) -> int:
        """The number of parameters (a tied head counts once)."""
        return sum(s.size for s in jax.tree.leaves(_blueprint(self.config, self.lora)[1]))

    # -- training forward ------------------------------------------------------------------------------------------

    def hidden(self, params: Params, tokens, positions, segment_ids) -> jax.Array:
        """Hidden states after the final norm, `[B, T, D]` in compute dtype."""
        net, place, c = self._network(params), self._place, self.config
        rope = net.rope(positions)
        implementation = attention_lib.resolve(
            self.attention, self.compute_dtype, heads=c.num_heads, kv_heads=c.num_kv_heads, head_dim=c.head_dim
        )

        def attend(q, k, v, state):
            q, k, v = (place(x, *_HEADS, like=k) for x in (q, k, v))
            out = attention_lib.attention(
                q, k, v, segment_ids,
                window=c.sliding_window, implementation=implementation, max_segments=self.max_segments, place=place,
            )  # fmt: skip
            return place(out, *_HEADS, like=k), state

        grouped = self.experts == "grouped" or (self.experts == "auto" and jax.default_backend() != "cpu")
        mix = moe.grouped(place) if grouped else moe.dense
        stacked, block = net.split_layers()

        def at_rest(x_MxD):  # the sharding of the rows, also where M would divide further
            return place(x_MxD.reshape(*tokens.shape, -1), "batch", None, None).reshape(x_MxD.shape)

        def layer(x_MxD, params):
            x_MxD, _ = block(params)(at_rest(x_MxD), rope, attend, None, mix)
            return at_rest(x_MxD), None

        unrolled = self._unrolled()
        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_policy(self.remat, implementation), prevent_cse=unrolled)
        x_MxD = at_rest(net.embed(tokens.reshape(-1), self.compute_dtype, place))
        x_MxD, _ = jax.lax.scan(layer, x_MxD, stacked, unroll=c.num_layers if unrolled else 1)
        return net.normalize(x_MxD).reshape(*tokens.shape, -1)

    def logits(self, params: Params, tokens, positions, segment_ids) -> jax.Array:
        """Next-token logits, float32 `[B, T, V]`. For training use `token_logprobs`, which never holds this array."""
        hidden = self.hidden(params, tokens, positions, segment_ids)
        return logprobs.head_logits(hidden, self._network(params).head_weights())

    def token_logprobs(self, params: Params, tokens, positions, segment_ids, temperature=1.0):
        """Log-prob of every token given those before it in its segment, and the entropy it was drawn from.

        Args:
          params: the tree of parameters.
          tokens, positions, segment_ids: int32 `[B, T]`.
          temperature: what the logits are divided by; a positive scalar, not differentiated.

        Returns:
          `(logprobs, entropy)`, float32 `[B, T]` in nats, aligned with the token: entry t speaks of tokens[t]. Both are
          0 at the first token of each segment and at padding.
        """
        inputs, scored = self._scoring(params, tokens, positions, segment_ids, temperature)
        logprob, entropy = logprobs.chunked_logprobs(*inputs)
        return tuple(jnp.where(scored, x, 0.0).reshape(tokens.shape) for x in (logprob, entropy))

    def token_loss(self, params: Params, tokens, positions, segment_ids, loss, arrays, temperature=1.0):
        """A sum over tokens of a function of their log-probs: `token_logprobs`, then `loss`, at three quarters of the
        head's work, because a chunk's gradient is taken while its logits are there.

        Args:
          params, tokens, positions, segment_ids, temperature: as in `token_logprobs`.
          loss: `(logprobs, entropy, (by_token, constant)) -> (scalar, aux)`, called with all tokens for its value and
            with chunks of them for its gradient; must be a sum over tokens (nothing of whole sequences), add nothing
            where every array of `by_token` is 0, and close over no array.
          arrays: `(by_token, constant)`: a tree of `[B, T]` arrays, and a tree given to every call as it is.

        Returns:
          What `loss` returns.
        """
        (hidden, head, targets, temperature, chunk, place), scored = self._scoring(
            params, tokens, positions, segment_ids, temperature
        )
        by_token, constant = arrays
        flat = jax.tree.map(lambda x: place(x.reshape(targets.shape), "batch", None), by_token)

        def of_scored(logprob, entropy, given):
            (scored, by_token), constant = given
            return loss(*(jnp.where(scored, x, 0.0) for x in (logprob, entropy)), (by_token, constant))

        given = ((scored, flat), constant)
        return logprobs.chunked_loss(of_scored, hidden, head, targets, given, temperature, chunk, place)

    def _scoring(self, params, tokens, positions, segment_ids, temperature):
        """What `logprobs` asks for, with the rows of a device end to end; and `[R, M]`, whether a token follows one."""
        hidden = self.hidden(params, tokens, positions, segment_ids)
        # Entry t needs the hidden state of t - 1; what wraps around in the first column is not scored.
        previous = jnp.roll(hidden, 1, axis=1)
        shards = self._place.batch_shards(tokens.shape[0])
        same = (segment_ids == jnp.roll(segment_ids, 1, axis=1)) & (segment_ids != 0)
        scored = same & (jnp.arange(tokens.shape[1]) > 0)[None]
        flat, targets, scored = (x.reshape(shards, -1, *x.shape[2:]) for x in (previous, tokens, scored))
        chunk = logprobs.chunk_size(flat.shape[1], self.config.vocab_size)
        inputs = (
            self._place(flat, "batch", None, None),
            self._network(params).head_weights(),
            self._place(targets, "batch", None),
            jnp.asarray(temperature, jnp.float32),
            chunk,
            self._place,
        )
        return inputs, self._place(scored, "batch", None)

    # -- generation ------------------------------------------------------------------------------------------------

    def init_cache(self, slots: int, length: int, dtype=None) -> decode.Cache:
        """An empty cache for `slots` sequences of at most `length` tokens; dtype defaults to compute dtype."""
        return decode.init_cache(self, slots, length, dtype)

    def prefill(self, params: Params, cache, tokens, lengths, slots):
        """Writes prompts into cache slots; see `decode.prefill`."""
        return decode.prefill(self, params, cache, tokens, lengths, slots)

    def decode(self, params: Params, cache, tokens, positions):
        """One generation step of every slot; see `decode.step`."""
        return decode.step(self, params, cache, tokens, positions)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _unrolled(self) -> bool:
        if self.layers != "auto":
            return self.layers == "unrolled"
        # Without a loop, XLA's CPU compiler keeps what was to be computed again, and gathers all layers at once.
        alone = self.mesh is None or self.mesh.size == 1
        if jax.default_backend() == "cpu":
            return self.remat == "none" and alone
        return not self.config.num_experts  # many layers of much code each: a mixture would compile for many minutes

    @property
    def _place(self) -> sharding.Place:
        return sharding.Place(self.mesh, self.rules)

    def _network(self, params: Params) -> Decoder:
        return nnx.merge(_blueprint(self.config, self.lora)[0], params)


# Queries are split as their keys are: where the key/value heads do not divide, neither do the groups of queries.
_HEADS = ("batch", None, "kv_heads", None)


def _policy(remat: str, implementation: str):
    """What `jax.checkpoint` keeps; of attention's result, what its own backward pass needs."""
    names = set(REMAT[remat])
    if "attention_out" not in names:
        return jax.checkpoint_policies.save_only_these_names(*names)
    names.remove("attention_out")
    if implementation != "cudnn":
        return jax.checkpoint_policies.save_only_these_names(*names, *attention_lib.XLA_KEEPS)
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keep(primitive, *args, **params):
        kernel = primitive.name.startswith(attention_cudnn.FORWARD_PRIMITIVE)
        return kernel or named(primitive, *args, **params)

    return keep


@functools.lru_cache(maxsize=16)
def _initializer(model: Model, param_dtype: str):
    def init(rng: jax.Array) -> Params:
        return _random(model, rng, param_dtype)

    return jax.jit(init, out_shardings=None if model.mesh is None else model.param_shardings())


def _random(model: Model, rng: jax.Array, param_dtype: str) -> Params:
    params = nnx.to_pure_dict(nnx.split(Decoder(model.config, model.lora, rng), nnx.Param, graph=False)[1])
    return jax.tree.map(lambda x: x.astype(param_dtype), params)


def add_lora(model: Model, params: Params, rng: jax.Array | None = None) -> Params:
    """`params` with fresh adapters where the model has them: A random, B zero, so nothing changes yet."""
    if model.lora is None:
        return params
    flat = tables.flatten(params)
    dtype = next(iter(flat.values())).dtype.name

    def adapters(tree):
        return {path: x for path, x in tables.flatten(tree).items() if lora_lib.is_adapter(path)}

    where = None if model.mesh is None else adapters(model.param_shardings())
    make = jax.jit(lambda rng: adapters(_random(model, rng, dtype)), out_shardings=where)
    fresh = make(jax.random.key(0) if rng is None else rng)
    return tables.unflatten({path: (fresh | flat)[path] for path in tables.flatten(model.abstract_params())})


def param_shardings(model: Model, mesh: Mesh, rules: sharding.Rules = sharding.RULES) -> Params:
    """The tree of `NamedSharding` of the model's parameters on `mesh`; fits the optimizer's moments as well."""
    return model.with_(mesh=mesh, rules=rules).param_shardings()
