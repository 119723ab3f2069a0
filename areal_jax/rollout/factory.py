"""Makes the engine and the sampling that a run's settings ask for; only then is jax or vLLM imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_jax.config import ConfigError
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import Engine, Sampling


def make_engine(config: RolloutConfig, model_path: str, *, seed: int, workdir: str | os.PathLike) -> Engine:
    """An engine, not started yet, for the checkpoint folder `model_path`; raises `ValueError` for an unknown one.

    `seed` is this worker's own: vLLM's generator takes it. The embedded engine's random numbers come with each request.
    `workdir` is the run's folder: weights from other hosts need it.
    """
    if config.engine == "jax":
        from areal_jax.rollout.jax_engine import make_jax_engine

        check_engine_args(config.engine, config.engine_args)
        return make_jax_engine(config, model_path, workdir)
    if config.engine == "vllm":
        from areal_jax.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model_path,
            slots=config.slots,
            max_length=config.max_length,
            kv_policy=config.kv_policy,
            interruptible=config.interruptible,
            dtype=config.dtype,
            seed=seed,
            workdir=workdir,
            weights_timeout=config.weights_timeout,
            engine_args=dict(config.engine_args),
        )
    raise ConfigError(f"rollout.engine is {config.engine!r}; it must be 'jax' or 'vllm'")


def samplings(config: RolloutConfig, model_path: str | os.PathLike, tokenizer: Any) -> tuple[Sampling, Sampling]:
    """How a run samples, for training and for evaluation.

    A completion ends with the tokenizer's end token, or one that the checkpoint's generation settings name.
    """
    stops = {tokenizer.eos_token_id}
    path = Path(model_path) / "generation_config.json"
    if path.exists():
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(more) if isinstance(more, list) else {more}
    common = {
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "stop_token_ids": tuple(sorted(stops - {None})),
    }
    training = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, **common)
    return training, Sampling(temperature=config.eval_temperature, **common)


def check_engine_args(engine: str, arguments: Mapping[str, Any], python: str = "") -> None:
    """Raises `ConfigError` for `rollout.engine_args` that the engine cannot take.

    vLLM's names are those of the vLLM beside this program: not known where the workers have a `python` of their own.
    """
    if engine == "vllm":
        from areal_jax.rollout.vllm_engine import check_args, known_args

        check_args(arguments, set() if python else known_args())
        return
    if unknown := sorted(set(arguments) - {"prefill_rows"}):
        raise ConfigError(f"rollout.engine_args has {unknown}; the engine 'jax' knows only 'prefill_rows'")
    rows = arguments.get("prefill_rows", 1)
    if type(rows) is not int or rows < 1:
        raise ConfigError(f"rollout.engine_args.prefill_rows={rows!r} must be a whole number of at least 1")
