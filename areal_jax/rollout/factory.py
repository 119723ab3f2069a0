"""Makes the engine that a run's settings ask for; only then is jax or vLLM imported."""

from __future__ import annotations

from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import Engine


def make_engine(config: RolloutConfig, model_path: str) -> Engine:
    """An engine, not started yet, for the checkpoint folder `model_path`; raises `ValueError` for an unknown one."""
    if config.engine == "jax":
        from areal_jax.models import Model, ModelConfig
        from areal_jax.rollout.jax_engine import JaxEngine, hf_loader

        unknown = set(config.engine_args) - {"prefill_rows"}
        if unknown:
            raise ValueError(f"rollout.engine_args has {sorted(unknown)}; the engine 'jax' knows only 'prefill_rows'")
        model = Model(ModelConfig.from_hf(model_path), compute_dtype=config.dtype)
        return JaxEngine(
            model,
            hf_loader(model, config.dtype, config.weights_timeout),
            slots=config.slots,
            max_length=config.max_length,
            steps_per_dispatch=config.steps_per_dispatch,
            kv_policy=config.kv_policy,
            interruptible=config.interruptible,
            dtype=config.dtype,
            **config.engine_args,
        )
    if config.engine == "vllm":
        from areal_jax.rollout.vllm_engine import make_vllm_engine

        return make_vllm_engine(config, model_path)
    raise ValueError(f"rollout.engine is {config.engine!r}; it must be 'jax' or 'vllm'")
