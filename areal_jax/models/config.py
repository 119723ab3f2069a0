"""What a checkpoint's `config.json` says about the network, as one frozen value.

Each family has a reader of a few lines: it maps the keys of its own `config.json` onto `ModelConfig` and refuses, with
a sentence, whatever would change the numbers and is not implemented. Both the old keys (`rope_theta`, `rope_scaling`)
and the new one (`rope_parameters`) are understood.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class ModelError(Exception):
    """Something about a model or a checkpoint is not as expected; the message says what, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base, and how frequencies are stretched for contexts beyond pre-training."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_position: int = 8192  # llama3 only


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer: sizes and switches, no arrays, no run-time choices."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention's output projection
    qk_norm: bool = False
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    num_experts: int = 0  # 0: a dense feed-forward layer
    experts_per_token: int = 0
    expert_mlp_size: int = 0
    renormalize_router: bool = True  # the chosen experts' weights sum to one
    max_positions: int = 32_768
    init_std: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head size")

    @classmethod
    def from_hf(cls, source: str | os.PathLike | Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face config: a folder, a `config.json`, or its contents as a mapping.

        Raises:
          ModelError: the architecture, or one of its options, is not implemented.
        """
        hf = source if isinstance(source, Mapping) else _read_json(source)
        name = (hf.get("architectures") or [None])[0] or hf.get("model_type")
        for family, (architecture, model_type, reader) in READERS.items():
            if name in (architecture, model_type):
                return reader(_Keys(hf, family), family)
        known = ", ".join(architecture for architecture, _, _ in READERS.values())
        raise ModelError(f"architecture {name!r} is not implemented; implemented: {known}")

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as the contents of a `config.json`, for checkpoints that have no original folder."""
        architecture, model_type, _ = READERS[self.family]
        hf = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_size,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "rope_theta": self.rope.theta,
            "rope_scaling": None,
        }
        if self.rope.kind != "default":
            hf["rope_scaling"] = {"rope_type": self.rope.kind, "factor": self.rope.factor}
        if self.rope.kind == "llama3":
            hf["rope_scaling"] |= {
                "low_freq_factor": self.rope.low_freq_factor,
                "high_freq_factor": self.rope.high_freq_factor,
                "original_max_position_embeddings": self.rope.original_max_position,
            }
        if self.family in ("llama", "qwen3", "qwen3_moe"):
            hf["attention_bias"] = self.qkv_bias
        if self.family == "mistral":
            hf["sliding_window"] = self.sliding_window
        elif self.sliding_window:
            hf |= {"use_sliding_window": True, "sliding_window": self.sliding_window, "max_window_layers": 0}
        if self.num_experts:
            hf |= {
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.expert_mlp_size,
                "norm_topk_prob": self.renormalize_router,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return hf


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    path = os.fspath(path)
    path = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError as e:
        raise ModelError(f"no config.json at {path!r}; give the folder of a Hugging Face checkpoint") from e
    except ValueError as e:
        raise ModelError(f"{path!r} is not JSON: {e}") from e


class _Keys:
    """A config mapping whose missing keys are errors that name the family."""

    def __init__(self, hf: Mapping[str, Any], family: str):
        self.hf, self.family = hf, family

    def __getitem__(self, key: str) -> Any:
        if key not in self.hf:
            raise ModelError(f"config.json of family {self.family!r} lacks {key!r}")
        return self.hf[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.hf.get(key, default)

    def refuse(self, key: str, *accepted: Any) -> None:
        if key in self.hf and self.hf[key] not in accepted:
            raise ModelError(f"{key}={self.hf[key]!r} is not implemented for {self.family!r} (accepted: {accepted})")


def _rope(hf: _Keys) -> Rope:
    scaling = _Keys(dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {}), hf.family)
    if nested := [key for key, value in scaling.hf.items() if isinstance(value, Mapping)]:
        raise ModelError(f"rope parameters of some layers ({', '.join(nested)}) are not implemented, only of all alike")
    scaling.refuse("partial_rotary_factor", 1.0, None)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling.get("original_max_position_embeddings") or hf["max_position_embeddings"]),
        )
    raise ModelError(f"rope type {kind!r} is not implemented (implemented: default, linear, llama3)")


def _common(hf: _Keys, family: str) -> dict[str, Any]:
    hf.refuse("hidden_act", "silu", "swish")
    hf.refuse("mlp_bias", False, None)
    hf.refuse("partial_rotary_factor", 1.0, None)
    if quantized := hf.get("quantization_config"):
        method = quantized.get("quant_method", "of an unnamed method")
        raise ModelError(
            f"the checkpoint is quantized ({method}), and such weights cannot be trained; give the one in bfloat16, "
            "float16 or float32"
        )
    heads = hf["num_attention_heads"]
    return dict(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_size=hf["intermediate_size"],
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope=_rope(hf),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_positions=hf.get("max_position_embeddings", 32_768),
        init_std=float(hf.get("initializer_range", 0.02)),
    )


def _window(hf: _Keys) -> int | None:
    """Qwen's sliding window: the layers from `max_window_layers` on have one, the layers before see everything."""
    window = (hf.get("sliding_window", 4096) or None) if hf.get("use_sliding_window") else None
    if not window or hf.family == "qwen3_moe":  # there, all layers have it
        return window
    layers, full = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    _check_alike(kinds)
    return window if kinds[0] == "sliding_attention" else None


def _check_alike(layer_types: Sequence[str]) -> None:
    if len(set(layer_types)) > 1:
        raise ModelError("layers with and without a sliding window in one model are not implemented (layer_types)")


def _qwen2(hf: _Keys, family: str) -> ModelConfig:
    return ModelConfig(**_common(hf, family), qkv_bias=True, sliding_window=_window(hf))


def _qwen3(hf: _Keys, family: str) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    common = _common(hf, family) | {"head_dim": hf.get("head_dim") or 128}
    return ModelConfig(**common, qkv_bias=bias, output_bias=bias, qk_norm=True, sliding_window=_window(hf))


def _qwen3_moe(hf: _Keys, family: str) -> ModelConfig:
    hf.refuse("decoder_sparse_step", 1)
    hf.refuse("mlp_only_layers", [], None)
    experts = hf.get("num_experts") or hf.get("num_local_experts")
    if not experts:
        raise ModelError("config.json of family 'qwen3_moe' lacks 'num_experts'")
    dense = _qwen3(hf, family)
    if not hf.get("head_dim"):  # transformers has no default of its own here: hidden size over heads
        dense = dataclasses.replace(dense, head_dim=dense.hidden_size // dense.num_heads)
    return dataclasses.replace(
        dense,
        num_experts=experts,
        experts_per_token=hf["num_experts_per_tok"],
        expert_mlp_size=hf["moe_intermediate_size"],
        renormalize_router=bool(hf.get("norm_topk_prob", False)),
    )


def _llama(hf: _Keys, family: str) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(hf, family), qkv_bias=bias, output_bias=bias)


def _mistral(hf: _Keys, family: str) -> ModelConfig:
    _check_alike(hf.get("layer_types") or ())  # vLLM would heed them, transformers does not
    return ModelConfig(**_common(hf, family), sliding_window=hf.get("sliding_window", 4096) or None)  # 0: none, too


# family: (architecture, model_type, reader). A new dense family is one line here and one in `tables.TABLES`.
READERS: dict[str, tuple[str, str, Callable[[_Keys, str], ModelConfig]]] = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", _qwen3),
    "llama": ("LlamaForCausalLM", "llama", _llama),
    "mistral": ("MistralForCausalLM", "mistral", _mistral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe),
}
