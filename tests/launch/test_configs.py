"""The shipped configs: every field is known and in range, and the models fit the hardware that the docstrings name."""

import math
import runpy
from pathlib import Path

import pytest

from areal_jax.config import resolve
from areal_jax.launch.validate import check_settings
from areal_jax.models import Model, ModelConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
GIB = 2**30
# hidden, layers, heads, kv heads, mlp, vocabulary, tied: the published config.json files.
SHAPES = {
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, False),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "14B": (5120, 48, 40, 8, 13_824, 152_064, False),
    "32B": (5120, 64, 40, 8, 27_648, 152_064, False),
}
TRAINER_GPUS = {
    "gsm8k_qwen2_5_1_5b": 4, "areal_math_1_5b": 32, "areal_math_1_5b_8gpu": 2, "areal_math_7b": 48,
    "areal_code_14b": 64, "areal_code_32b": 96,
}  # fmt: skip
ALL_GPUS = {
    "gsm8k_qwen2_5_1_5b": 8, "areal_math_1_5b": 128, "areal_math_1_5b_8gpu": 8, "areal_math_7b": 192,
    "areal_code_14b": 256, "areal_code_32b": 384,
}  # fmt: skip


def load(path):
    module = runpy.run_path(str(path))
    return module, resolve(module["get_config"]())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_is_known_and_possible(path):
    module, config = load(path)
    check_settings(config)
    for word in ("Command:", "Hardware:"):
        assert word in module["__doc__"], f"{path.name}: the docstring lacks '{word}'"


@pytest.mark.parametrize("name", TRAINER_GPUS)
def test_the_model_fits_the_stated_gpus(name):
    _, config = load(next(path for path in CONFIGS if path.stem == name))
    size = next(size for size in ("1.5B", "14B", "32B", "7B") if size in config["model"])
    hidden, layers, heads, kv_heads, mlp, vocab, tied = SHAPES[size]
    model = Model(
        ModelConfig(
            family="qwen2", vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=hidden // heads, mlp_size=mlp, tie_embeddings=tied, qkv_bias=True,
        )
    )  # fmt: skip
    parameters = model.num_params()
    assert math.isclose(parameters / 1e9, {"1.5B": 1.78, "7B": 7.62, "14B": 14.77, "32B": 32.76}[size], rel_tol=0.01)

    trainer, rollout = config["trainer"], config["rollout"]
    gpus, per_engine = TRAINER_GPUS[name], config["launch"]["rollout_gpus"]
    assert rollout["workers"] * per_engine + gpus == ALL_GPUS[name]
    # fp32 parameters, two moments and gradients over all trainer GPUs; what remat keeps of each layer in bf16.
    state = parameters * 4 * 4 / gpus
    tokens = trainer["rows"] * trainer["row_length"] * trainer["tensor"] / gpus
    kept = {"attention": 2, "attention_qkv": 4}[trainer["remat"]]
    activations = tokens * layers * hidden * kept * 2 / trainer["tensor"]
    assert state + activations < 60 * GIB, f"{(state + activations) / GIB:.0f} GiB of 80 in the trainer"
    assert trainer["rows"] % (gpus // trainer["tensor"]) == 0, "every device gets whole rows"
    # bf16 weights in each engine, and room for the cache of at least eight of the longest sequences
    weights = parameters * 2 / per_engine
    cache = 2 * layers * kv_heads * (hidden // heads) * 2 * rollout["max_length"] * 8 / per_engine
    assert weights + cache < 70 * GIB, f"{(weights + cache) / GIB:.0f} GiB of 80 in an engine"


def test_the_quick_start_trains_the_shipped_checkpoint():
    _, config = load(next(path for path in CONFIGS if path.stem == "quickstart"))
    folder = Path(config["model"])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    assert ModelConfig.from_hf(folder).family == "qwen2" and (folder / "tokenizer.json").exists()
