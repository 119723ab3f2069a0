"""What a generation engine is. The embedded JAX engine and vLLM both fit it; workflows see nothing else.

Contract: `generate` may be called concurrently, any number of times. `update_weights` may be called while requests
are in flight: the engine stops at its next dispatch boundary, loads, recomputes or keeps its caches (`kv_policy`) and
goes on with the same requests; every token is stamped inside the engine with the version of the weights that sampled
it. An update that fails (a checksum, a shape) leaves the old version in place and raises `WeightsRefused`. After an
engine died, every call raises `EngineDied`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from areal_jax.transport.messages import Manifest
from areal_jax.weights import WeightsRefused

__all__ = ["Completion", "Engine", "EngineDied", "Request", "Sampling", "WeightsRefused"]


class EngineDied(RuntimeError):
    """The engine cannot generate any more; the worker must report it and end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. The log-probs returned are those of the distribution after all of these."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 means greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Continue `tokens`. `key` = (run seed, group, sample) fixes the random numbers of every position."""

    tokens: np.ndarray  # int32 [T], T >= 1
    sampling: Sampling
    key: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """New tokens only; all arrays [N]. The stop token is included when there is one."""

    tokens: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    versions: np.ndarray  # int32, non-decreasing
    finish_reason: str  # "stop" or "length"


class Engine(Protocol):
    version: int  # of the weights that will sample the next token
    slots: int  # sequences that run at once; further requests wait inside the engine
    max_length: int  # prompt and new tokens together
    paused: bool  # generation stands still for new weights
    on_change: Callable[[], None] | None  # called, from any thread, whenever `paused` has changed

    async def start(self, manifest: Manifest) -> None:
        """Load the first weights and get ready (compile, warm up)."""

    async def generate(self, request: Request) -> Completion: ...

    async def update_weights(self, manifest: Manifest) -> dict[str, float]:
        """Load a newer version. Returns seconds for: read, convert, load, pause, recompute."""

    def stats(self) -> dict[str, float]:
        """Cumulative tokens_generated, tokens_prefilled, tokens_recomputed, ...; momentary `running`, `waiting`."""

    async def close(self) -> None:
        """Free everything; requests in flight raise `EngineDied`."""
