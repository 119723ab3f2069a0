"""Registers our weight receiver with vLLM; named by the entry-point group `vllm.general_plugins` in pyproject.toml.

vLLM calls `register` in each of its processes. This module imports nothing; the receiver is in `vllm_receiver`.
"""

BACKEND = "areal_jax"


def register() -> None:
    """Make `WeightTransferConfig(backend="areal_jax")` known to vLLM in this process; may be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "areal_jax.rollout.vllm_receiver", "Receiver")
