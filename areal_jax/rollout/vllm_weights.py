"""Registers our weight receiver with vLLM; named by the entry-point group `vllm.general_plugins` in pyproject.toml.

vLLM calls `register` in each of its processes. This module is cheap to import; the receiver is in `vllm_receiver`.
"""

import os
import select
import threading

BACKEND = "areal_jax"
OWNER = "AREAL_JAX_VLLM_OWNER"  # environment variable: process id of the rollout worker that started vLLM


def register() -> None:
    """Make `WeightTransferConfig(backend="areal_jax")` known to vLLM in this process; may be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "areal_jax.rollout.vllm_receiver", "Receiver")
        if os.environ.get(OWNER, str(os.getpid())) != str(os.getpid()):
            threading.Thread(target=_end_with, args=(int(os.environ[OWNER]),), daemon=True).start()


def _end_with(owner: int) -> None:
    """End this process when `owner` ends: vLLM's engine process would outlive a killed rollout worker."""
    try:
        watched = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)
    select.select([watched], [], [])
    os._exit(1)
