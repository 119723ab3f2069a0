"""How much memory a run needs on each GPU: arithmetic on sizes, nothing is allocated and jax is not imported.

The parts that grow with the model are exact; activations and temporary arrays are counted as the code makes them. It is
meant to find what cannot fit, and by how much, before anything starts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.packing import max_segments

if TYPE_CHECKING:
    from areal_jax.models.config import ModelConfig

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS_PER_CHUNK = 2**29  # as in models/logprobs.py for GPUs; a test compares the two
RUNTIME = 1.5 * GIB  # CUDA context, libraries, collectives


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, part by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size > 0.05 * GIB)
        return f"{self.total / GIB:.1f} GiB ({parts})"


def num_params(c: ModelConfig, *, active: bool = False) -> int:
    """Parameters of the network; a tied head counts once. `active`: of the experts, those that a token passes."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.hidden_size * (2 * queries + 2 * keys)
    attention += c.qkv_bias * (queries + 2 * keys) + c.output_bias * c.hidden_size + c.qk_norm * 2 * c.head_dim
    mlp = 0 if c.num_experts else 3 * c.hidden_size * c.mlp_size
    mixed = _experts(c, c.experts_per_token if active else c.num_experts)
    return c.num_layers * (attention + mlp + 2 * c.hidden_size) + mixed + _tables(c) + c.hidden_size


def _experts(c: ModelConfig, experts: int) -> int:
    """Parameters of all layers' routers, and of so many of their experts."""
    return c.num_layers * c.hidden_size * (c.num_experts + 3 * experts * c.expert_mlp_size)


def _tables(c: ModelConfig) -> int:
    """Parameters of the embedding, and of the head where that is another matrix."""
    return (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size


def trainer(c: ModelConfig, t: TrainerConfig, devices: int) -> Estimate:
    """What each of `devices` GPUs of the trainer holds at the worst moment of a step.

    Raises `ValueError` where the mesh does not fit the number of devices.
    """
    data, fsdp, tensor, expert = mesh_sizes(t, devices).values()
    params, mixed = num_params(c), _experts(c, c.num_experts)
    shards = fsdp * tensor * params / (params - mixed + mixed / expert)  # only experts are split over `expert`
    trained, trained_shards = params, shards
    if t.lora_rank:
        trained, trained_shards = num_adapters(c, t.lora_rank), fsdp * tensor
    width = BYTES[t.compute_dtype]
    rows = t.fixed_sequences if t.packing == "fixed" else t.rows
    tokens = max(1, rows // (data * fsdp)) * t.row_length
    layer = (params - _tables(c)) / c.num_layers
    logits = min(tokens * c.vocab_size, max(128 * c.vocab_size, LOGITS_PER_CHUNK)) / tensor
    head = c.vocab_size * c.hidden_size / tensor
    # Without flash attention, a few float32 arrays of one block's scores, a quarter of the row's queries.
    scores = 3 * 4 * t.row_length / 4 * c.num_heads / _split(c, tensor) * (t.attention == "xla")
    # Flash attention leaves a float32 for every token, head and segment that the token's row may hold: its outputs are
    # kept with attention's result, or exist for one layer at a time.
    statistics = 4 * max(2, max_segments(t)) * c.num_heads / _split(c, tensor) * (t.attention != "xla")
    blocks, size = _blocks(c, tokens, expert)
    slots, copied = blocks * size / tokens, blocks * 3 * c.hidden_size * c.expert_mlp_size / tensor
    return Estimate(
        {
            "parameters": params * BYTES[t.param_dtype] * (2 if t.kl_coef else 1) / shards,
            "moments": trained * 8 / trained_shards,
            "gradients": trained * 4 / trained_shards,
            "a micro-batch's gradients": trained * BYTES[t.param_dtype] / trained_shards,
            "kept activations": c.num_layers * tokens * width * _kept(c, t.remat, tensor, slots),
            "flash statistics": tokens * statistics * (1 if t.remat == "full" else c.num_layers),
            "one layer": tokens * width * _kept(c, "none", tensor, slots) + 2 * layer * (4 + width) / (tensor * expert),
            "experts' weights by block": copied * width,
            "scores": tokens * scores,
            "logits": logits * (2 * 4 + width),
            "head": head * (4 + width) + 4 * tokens * c.hidden_size,
            "runtime": RUNTIME,
        }
    )


def engine(c: ModelConfig, dtype: str, max_length: int, gpus: int, sequences: int = 1) -> Estimate:
    """What each of the `gpus` of one rollout worker must hold at least: weights, and caches of full length."""
    keys = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    return Estimate(
        {
            "weights": num_params(c) * BYTES[dtype] / gpus,
            "caches": sequences * max_length * keys * BYTES[dtype] / gpus,
            "runtime": RUNTIME,
        }
    )


def mesh_sizes(t: TrainerConfig, devices: int) -> dict[str, int]:
    """The size of each axis of the mesh on so many devices: one of -1 takes what is left.

    Raises `ValueError` where that is impossible.
    """
    sizes = {"data": t.data_parallel, "fsdp": t.fsdp, "tensor": t.tensor, "expert": t.expert}
    left, fixed = list(sizes.values()).count(-1), math.prod(size for size in sizes.values() if size != -1)
    if left > 1 or fixed < 1 or devices % fixed or (not left and fixed != devices):
        raise ValueError(
            f"trainer mesh {sizes} does not fit {devices} devices: the sizes must multiply to that number, one of them "
            "may be -1"
        )
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def _blocks(c: ModelConfig, tokens: int, expert: int) -> tuple[int, int]:
    """How many blocks of how many rows a device lays its tokens out in for its experts, as in models/moe.py."""
    if not c.num_experts:
        return 0, 0
    pairs = tokens * c.experts_per_token
    size = 64 * max(1, round(20 * math.sqrt(pairs / c.num_experts) / 64))
    return -(-(pairs // size + c.num_experts // expert) // expert) * expert, size


def _kept(c: ModelConfig, remat: str, tensor: int, slots: float) -> float:
    """Numbers per token that one layer keeps for the backward pass, besides its parameters (see models/model.py); of a
    mixture, each token has so many rows ("slots") before the experts."""
    stream, size = c.hidden_size, c.head_dim / _split(c, tensor)
    queries, keys = c.num_heads * size, c.num_kv_heads * size
    mlp = 0 if c.num_experts else c.mlp_size / tensor
    kept = {
        "full": 0.0,
        "attention": queries,
        "attention_qkv": 2 * queries + 2 * keys,
        "attention_mlp": 2 * queries + 2 * keys + 2 * mlp,
        # Also both norms' float32 inputs and scales, queries and keys before rotation, and the gated product.
        "none": 6 * stream + 4 * queries + 4 * keys + 4 * mlp + slots * (2 * stream + 4 * c.expert_mlp_size / tensor),
    }
    return stream + kept[remat]


def _split(c: ModelConfig, tensor: int) -> int:
    """Into how many parts attention's heads are split: key/value heads that do not divide stay whole (see sharding)."""
    return 1 if c.num_kv_heads % tensor else tensor


def num_adapters(c: ModelConfig, rank: int) -> int:
    """Parameters of low-rank adapters on all projections of a layer (fewer if fewer are chosen); experts have none."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    pairs = 2 * (c.hidden_size + queries) + 2 * (c.hidden_size + keys)
    return c.num_layers * rank * (pairs + (0 if c.num_experts else 3 * (c.hidden_size + c.mlp_size)))
