"""The two sides may live in different virtual environments: rollout workers without jax, the trainer without vLLM."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROLLOUT = (
    "areal_jax.rollout.__main__",
    "areal_jax.rollout.worker",
    "areal_jax.rollout.workflows",
    "areal_jax.rollout.factory",
    "areal_jax.rollout.vllm_engine",
    "areal_jax.rollout.vllm_weights",
    "areal_jax.weights",
    "areal_jax.transport.client",
)
OTHERS = ("areal_jax.controller.__main__", "areal_jax.rewards.__main__", "areal_jax.launch.__main__")
TRAINER = tuple(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("trainer", "models", "weights")
    for path in sorted((ROOT / "areal_jax" / package).glob("*.py"))
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
TORCH = ("torch", "vllm")


def import_without(modules, absent):
    """Import `modules` in a new process in which `absent` packages cannot be imported; returns its error output."""
    script = textwrap.dedent(f"""
        import importlib, importlib.abc, sys

        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {absent!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}} (as in that environment)", name=name)

        sys.meta_path.insert(0, Absent())
        for name in {modules!r}:
            importlib.import_module(name)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize(
    "modules, absent",
    [(ROLLOUT, JAX), (ROLLOUT, JAX + TORCH), (OTHERS, JAX + TORCH), (TRAINER, TORCH)],
    ids=["rollout without jax", "rollout package without either", "others without either", "trainer without torch"],
)
def test_imports(modules, absent):
    assert import_without(modules, absent) == ""


def test_the_check_can_fail():
    assert "No module named 'jax'" in import_without(("areal_jax.rollout.jax_engine",), JAX)
