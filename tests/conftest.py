"""Test-wide settings: eight fake CPU devices, strict promotion, no network, and every program compiled once.

Tests, xdist's workers and the processes that tests start share a folder of compiled programs; it goes with the session.
What counts recompilations counts programs that are found there too.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process of the session; jax reads this when imported
    COMPILED = tempfile.TemporaryDirectory(prefix="areal_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # not by XLA_FLAGS: child processes would inherit those


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
    """A silent bf16 -> fp32 promotion or rank broadcast is where log-prob bugs live: make both an error."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
