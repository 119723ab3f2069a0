"""Test-wide settings: eight fake CPU devices, strict promotion, and no network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # not by XLA_FLAGS: child processes would inherit those


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
    """A silent bf16 -> fp32 promotion or rank broadcast is where log-prob bugs live: make both an error."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
