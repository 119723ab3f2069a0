"""What the README says is true: its code runs, its files and links are there."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs():
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "losses" in block)
    random = np.random.default_rng(0)
    logprobs = jnp.asarray(-random.uniform(0.1, 2.0, (64, 5)), jnp.float32)
    values = {
        "rewards": jnp.asarray(random.integers(0, 2, 64), jnp.float32),
        "group_ids": jnp.arange(64, dtype=jnp.int32) // 2,
        "logprobs": logprobs,
        "proximal_logprobs": logprobs,
        "behavior_logprobs": logprobs,
        "mask": jnp.ones((64, 5), bool),
    }
    exec(code, values)
    assert values["loss"].shape == () and np.isfinite(values["loss"])


def test_the_reward_example_is_a_verifier():
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "def reward" in block)
    values = {}
    exec(code, values)
    assert values["reward"](completion="it is 42", answer="42") == 1.0


def test_every_path_it_names_exists():
    named = re.findall(r"\b(?:areal_jax|configs|docs|launch|tools)/[\w./]*\w", TEXT)
    missing = sorted({path for path in named if not (ROOT / path).exists() and "PATH" not in path})
    assert named and not missing, missing
