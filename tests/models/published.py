"""`config.json` after published checkpoints, written from memory: the keys and sizes of such files, for tests."""

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1e6,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    "max_window_layers": 28,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960, "model_type": "qwen3",
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936, "max_window_layers": 36,
}  # fmt: skip
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3 = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


_05B, _15B, _7B = _sizes(896, 4864, 24, 14, 2), _sizes(1536, 8960, 28, 12, 2), _sizes(3584, 18944, 28, 28, 4)
CONFIGS = {
    "Qwen2.5-0.5B": _QWEN2 | _05B | {
        "max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 24, "use_mrope": False,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-Math-1.5B": _QWEN2 | _15B | {
        "max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096, "max_window_layers": 21,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B-Instruct": _QWEN2 | _7B | {
        "max_position_embeddings": 32768, "sliding_window": 131072, "tie_word_embeddings": False,
        "eos_token_id": 151645, "vocab_size": 152064,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2 | _15B | {
        "max_position_embeddings": 131072, "rope_theta": 10000, "sliding_window": 4096, "max_window_layers": 21,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-0.5B, saved anew": {  # as transformers 5 writes it
        k: v for k, v in (_QWEN2 | _05B).items() if k not in ("rope_theta", "torch_dtype")
    } | {
        "max_position_embeddings": 32768, "sliding_window": None, "layer_types": ["full_attention"] * 24,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16",
        "tie_word_embeddings": True, "pad_token_id": None,
    },
    "Qwen3-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, 8) | {"tie_word_embeddings": True, "max_window_layers": 28},
    "Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, 8) | {"tie_word_embeddings": False},
    "Qwen3-30B-A3B": _QWEN3 | _sizes(2048, 6144, 48, 32, 4) | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-8B-Instruct": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8),
    "Llama-3.2-1B": _LLAMA3 | _sizes(2048, 8192, 16, 32, 8) | {
        "head_dim": 64, "tie_word_embeddings": True, "eos_token_id": 128001,
        "rope_scaling": _LLAMA3["rope_scaling"] | {"factor": 32.0},
    },
    "TinyLlama-1.1B": _LLAMA | _sizes(2048, 5632, 22, 32, 4) | {
        "attention_bias": False, "max_position_embeddings": 2048, "rope_theta": 10000.0, "vocab_size": 32000,
    },
    "SmolLM2-135M": _LLAMA | _sizes(576, 1536, 30, 9, 3) | {
        "attention_bias": False, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "Llama-2-7b": {  # neither rope_theta nor num_key_value_heads
        k: v for k, v in (_LLAMA | _sizes(4096, 11008, 32, 32, 32)).items() if k != "num_key_value_heads"
    } | {"max_position_embeddings": 4096, "vocab_size": 32000, "torch_dtype": None},
    "deepseek-coder-6.7b": _LLAMA | _sizes(4096, 11008, 32, 32, 32) | {
        "max_position_embeddings": 16384, "rope_theta": 100000, "vocab_size": 32256, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "Mistral-7B-v0.1": _MISTRAL,
    "Mistral-7B-v0.3": _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "Mistral-Nemo": _MISTRAL | {
        "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 1024000, "num_hidden_layers": 40,
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 131072,
    },
}  # fmt: skip
