"""A tiny random checkpoint whose tokens are the letters of sums, so that turns end and markers appear by chance."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from areal_jax.models import Model, ModelConfig, export_hf
from tests.models import tiny

ALPHABET = ["<end>", "<pad>", *"0123456789+=;?#"]


def make_checkpoint(folder: Path) -> str:
    """Writes config, tokenizer and weights; heads are as large as vLLM's CPU build needs them."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = ModelConfig(
        family="qwen2", vocab_size=len(ALPHABET) + 3, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=32, mlp_size=64, qkv_bias=True, tie_embeddings=True, init_std=0.12, max_positions=256,
    )  # fmt: skip
    model = Model(config)
    export_hf(model, tiny.random_params(model), folder, dtype=np.float32)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return str(folder)
