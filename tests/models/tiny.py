"""Tiny random networks: one Hugging Face config per family, and packed rows to feed them."""

import functools
import itertools

import numpy as np

COMMON = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _hf(architecture: str, model_type: str, **extra):
    return COMMON | {"architectures": [architecture], "model_type": model_type} | extra


# Every way in which a checkpoint of these families can differ. The Llama entry has the old rope keys, Qwen3 the new.
CONFIGS = {
    "qwen2-tied": _hf("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, rope_theta=1e4),
    "qwen2-untied": _hf("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=False, rope_theta=1e6),
    "qwen2-window": _hf(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=50, max_window_layers=0,
        tie_word_embeddings=False,
    ),
    "qwen3": _hf(
        "Qwen3ForCausalLM", "qwen3", head_dim=20, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama3": _hf("LlamaForCausalLM", "llama", tie_word_embeddings=False, rope_theta=5e5, rope_scaling=LLAMA3),
    "llama-linear": _hf(
        "LlamaForCausalLM", "llama", tie_word_embeddings=True, attention_bias=True,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "mistral": _hf("MistralForCausalLM", "mistral", sliding_window=40, head_dim=16, tie_word_embeddings=False),
    "qwen3-moe": _hf(
        "Qwen3MoeForCausalLM", "qwen3_moe", head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=36,
        norm_topk_prob=True, tie_word_embeddings=False, mlp_only_layers=[], decoder_sparse_step=1,
    ),
}  # fmt: skip


def jit(f, **options):
    """`jax.jit` with half the compile time and slower code, which is what tests want."""
    import jax

    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **options)


def random_params(model, seed: int = 0):
    """As `model.init`: norms one, biases zero, the rest normal, on the model's mesh; by numpy: nothing to compile."""
    import jax

    rng = np.random.default_rng(seed)

    def make(path, spec):
        name = jax.tree_util.keystr(path[-1:])
        if "norm" in name or "bias" in name:
            return np.full(spec.shape, np.float32("norm" in name))
        return model.config.init_std * rng.standard_normal(spec.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(make, model.abstract_params())
    return jax.device_put(params, None if model.mesh is None else model.param_shardings())


@functools.cache
def model_and_params(name: str):
    """Our network of a tiny config with random parameters (biases and norms random too, so that they count)."""
    import jax
    import jax.numpy as jnp

    from areal_jax import models

    model, rng = models.Model(models.ModelConfig.from_hf(CONFIGS[name])), np.random.default_rng(1)

    def make(path, spec):
        value = 0.14 * rng.standard_normal(spec.shape, np.float32)
        return jnp.asarray(value + np.float32("norm" in jax.tree_util.keystr(path)))

    return model, jax.tree_util.tree_map_with_path(make, model.abstract_params())


def packed(rows: int, length: int, *, vocab: int = 131, seed: int = 0, segments: int = 4):
    """`(tokens, positions, segment_ids)`, int32 `[rows, length]`: uneven segments; odd rows end in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length), dtype=np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(rows):
        end = length - (row % 2) * (length // 8)
        cuts = np.sort(rng.choice(np.arange(2, end - 1), segments - 1, replace=False))
        bounds = [0, *cuts.tolist(), end]
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            positions[row, start:stop] = np.arange(stop - start)
            segment_ids[row, start:stop] = i + 1
    return tokens, positions, segment_ids


def one_sequence(rows: int, length: int, *, vocab: int = 131, seed: int = 0):
    """`(tokens, positions, segment_ids)` of rows that hold one sequence each."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)
