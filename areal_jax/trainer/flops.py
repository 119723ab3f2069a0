"""Model FLOPs of a training step, and the share of the accelerator's peak that they are (MFU).

A step's model FLOPs are 6 · N · tokens + 6 · layers · heads · head_dim · Σ length²: N parameters that a token is
multiplied with (no embedding table, the head once, of a mixture the chosen experts), two operations each forward and
four backward; attention is causal, so half of the square. Work that is done again (rematerialised, or log-probs of the
proximal and the reference policy) does not count. Most published figures count the whole square (PaLM, appendix B;
torchtitan; prime-rl): `causal=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from areal_jax.trainer.memory import num_adapters, num_params

if TYPE_CHECKING:
    from areal_jax.models.config import ModelConfig

# FLOP/s of the 16-bit tensor cores without sparsity, by the makers' data sheets; the first name found counts.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "GB200": 2500e12, "B200": 2250e12,
}  # fmt: skip


def peak_of(device_kind: str) -> tuple[str, float] | None:
    """The entry of `PEAKS` for a device of this name (`jax.Device.device_kind`)."""
    return next(((name, peak) for name, peak in PEAKS.items() if name in device_kind), None)


def model_flops(
    config: ModelConfig, lengths: Sequence[int] | np.ndarray, *, lora_rank: int = 0, causal: bool = True
) -> float:
    """FLOPs of forward and backward on sequences of these lengths (int `[N]`, in tokens).

    With adapters of `lora_rank` the other parameters have no gradient of their own: two operations less.
    """
    lengths = np.asarray(lengths, np.float64)
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    used = num_params(config, active=True) - table
    operations = 4 * used + 6 * num_adapters(config, lora_rank) if lora_rank else 6 * used
    square = config.num_layers * config.num_heads * config.head_dim * float((lengths**2).sum())
    return float(operations) * float(lengths.sum()) + (6 if causal else 12) * square


def speed(config: ModelConfig, lengths: Sequence[int], seconds: float, lora_rank: int = 0) -> dict[str, float]:
    """What a step's report says under `perf/`: tokens per second; MFU, and peak memory in GiB, where they are known."""
    report, device = {"perf/train_tokens_per_s": sum(lengths) / seconds}, jax.local_devices()[0]
    if known := peak_of(device.device_kind):
        flops = model_flops(config, lengths, lora_rank=lora_rank)
        report["perf/mfu"] = flops / seconds / (known[1] * jax.device_count())
    if stats := device.memory_stats():
        report["perf/peak_memory"] = stats["peak_bytes_in_use"] / 2**30
    return report
