"""Tiny random checkpoints that vLLM's CPU build can run (its attention wants heads of at least 32)."""

import json

import jax
import numpy as np

from areal_jax import models
from tests.models import tiny

_COMMON = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="float32",
    rope_theta=1e4,
)
_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
CONFIGS = {
    "qwen2": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=True, hidden_size=128
    ),  # this family has no head_dim of its own
    "qwen3": dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", tie_word_embeddings=False),
    "llama": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", tie_word_embeddings=False, rope_scaling=_ROPE
    ),
    "mistral": dict(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16, tie_word_embeddings=False
    ),
    "qwen3-moe": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, norm_topk_prob=True, tie_word_embeddings=False, mlp_only_layers=[],
        decoder_sparse_step=1,
    ),
}  # fmt: skip


def write_config(family: str, folder) -> str:
    """A folder with a Hugging Face config and nothing else: the weights come by manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_COMMON | CONFIGS[family]))
    return str(folder)


def random_params(model: models.Model, seed: int):
    """Parameters of one version; biases and norms are random too, so that they count."""
    params = tiny.random_params(model, seed)
    rng = np.random.default_rng([seed, 1])
    return jax.tree.map(lambda p: p + (0.05 * rng.standard_normal(p.shape)).astype(np.float32), params)
