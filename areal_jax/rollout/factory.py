"""Makes the engine that a run's settings ask for; only then is jax or vLLM imported."""

from __future__ import annotations

from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import Engine


def make_engine(config: RolloutConfig, model_path: str) -> Engine:
    """An engine, not started yet, for the checkpoint folder `model_path`; raises `ValueError` for an unknown one."""
    if config.engine == "jax":
        from areal_jax.rollout.jax_engine import make_jax_engine

        return make_jax_engine(config, model_path)
    if config.engine == "vllm":
        from areal_jax.rollout.vllm_engine import make_vllm_engine

        return make_vllm_engine(config, model_path)
    raise ValueError(f"rollout.engine is {config.engine!r}; it must be 'jax' or 'vllm'")
