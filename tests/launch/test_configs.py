"""The shipped configs: every field is known and in range, and the models fit the hardware that the docstrings name."""

import math
import re
import runpy
from pathlib import Path

import jax
import pytest

from areal_jax.config import resolve, section
from areal_jax.launch import fit
from areal_jax.launch.nodes import check_nodes, share_of
from areal_jax.launch.validate import check_settings
from areal_jax.models import Model, ModelConfig
from areal_jax.trainer import memory
from areal_jax.trainer.config import TrainerConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
GIB = 2**30
# hidden, layers, heads, kv heads, mlp, vocabulary, context, tied, of the published config.json files; parameters.
SHAPES = {
    "DeepSeek-R1-Distill-Qwen-1.5B": ((1536, 28, 12, 2, 8960, 151_936, 131_072, False), 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": ((3584, 28, 28, 4, 18_944, 152_064, 131_072, False), 7_615_616_512),
    "DeepSeek-R1-Distill-Qwen-14B": ((5120, 48, 40, 8, 13_824, 152_064, 131_072, False), 14_770_033_664),
    "DeepSeek-R1-Distill-Qwen-32B": ((5120, 64, 40, 8, 27_648, 152_064, 131_072, False), 32_763_876_352),
    "Qwen2.5-1.5B-Instruct": ((1536, 28, 12, 2, 8960, 151_936, 32_768, True), 1_543_714_304),
}
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
TRAINER_GPUS = {
    "gsm8k_qwen2_5_1_5b": 4, "areal_math_1_5b": 32, "areal_math_1_5b_8gpu": 2, "areal_math_7b": 48,
    "areal_code_14b": 64, "areal_code_32b": 96,
}  # fmt: skip
ALL_GPUS = {
    "gsm8k_qwen2_5_1_5b": 8, "areal_math_1_5b": 128, "areal_math_1_5b_8gpu": 8, "areal_math_7b": 192,
    "areal_code_14b": 256, "areal_code_32b": 384,
}  # fmt: skip
# What AReaL's paper (Tables 1, 7 and 8) and its GSM8K example report, as the docstrings must say it; training steps.
PUBLISHED = {
    "areal_math_1_5b": ("42.2 on AIME 2024 (base 29.3) after 250 steps in 14.8 hours", 250),
    "areal_math_7b": ("63.1 on AIME 2024 (base 54.3) after 250 steps in 25.4 hours", 250),
    "areal_code_14b": ("58.1 on LiveCodeBench (base 53.4) after 80 steps in 21.9 hours", 80),
    "areal_code_32b": ("61.0 on LiveCodeBench (base 57.4) after 60 steps in 31.1 hours", 60),
    "areal_math_1_5b_8gpu": ("AIME 2024              31.7  32.6  32.4  34.1  29.9  32.8", 250),
    "gsm8k_qwen2_5_1_5b": ("79.6 % on the test set", 290),
}


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
    values, parameters = SHAPES[Path(config["model"]).name]
    shape = ModelConfig.from_hf({"architectures": ["Qwen2ForCausalLM"], **dict(zip(KEYS, values, strict=True))})
    model = Model(shape)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params())) == parameters
    assert config["rollout"]["max_length"] <= shape.max_positions

    trainer, rollout = section(TrainerConfig, config["trainer"]), config["rollout"]
    gpus, per_engine = TRAINER_GPUS[name], config["launch"]["rollout_gpus"]
    assert rollout["workers"] * per_engine + gpus == ALL_GPUS[name]
    data, fsdp, tensor, _ = memory.mesh_sizes(trainer, gpus).values()
    assert trainer.rows % (data * fsdp) == 0, "every device gets whole rows"
    assert shape.num_kv_heads % tensor == 0 and gpus % trainer.processes == 0
    fraction = float(config["launch"]["trainer_env"].get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    fit.check_trainer(shape, trainer, [80 * GIB] * gpus, fraction)
    fit.check_engine(shape, rollout, per_engine, 80 * GIB)
    room = 0.9 * 80 * GIB - memory.engine(shape, rollout["dtype"], 0, per_engine).total
    longest = memory.engine(shape, rollout["dtype"], rollout["max_length"], per_engine).parts["caches"]
    assert room / longest > 8, "an engine should run more than a few of the longest answers at once"


@pytest.mark.parametrize("name", ALL_GPUS)
def test_every_gpu_of_every_node_is_used_and_tensor_parallel_devices_are_on_one_node(name):
    _, config = load(next(path for path in CONFIGS if path.stem == name))
    for part in ("controller", "rewards"):
        config[part]["address"] = "tcp://0.0.0.0:*"  # as launch/slurm.sh does
    check_nodes(config, ALL_GPUS[name] // 8)
    per_process = TRAINER_GPUS[name] // config["trainer"]["processes"]
    for node in range(ALL_GPUS[name] // 8):
        share = share_of(config, node, ALL_GPUS[name] // 8)
        training = len(share.trainers) * per_process
        assert training + len(share.workers) * config["launch"]["rollout_gpus"] == 8
        assert training % config["trainer"]["tensor"] == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_docstring_says_the_hardware_the_command_and_the_published_result(name):
    module, config = load(next(path for path in CONFIGS if path.stem == name))
    said, (result, steps) = module["__doc__"], PUBLISHED[name]
    assert result in said[said.index("Expect:") :] and config["trainer"]["steps"] == steps
    assert f"configs/{name}.py" in said[said.index("Command:") : said.index("Hardware:")]
    nodes = re.search(r"(\d+) nodes of 8 GPUs with 80 GB", said)
    if nodes:
        assert f"sbatch --nodes={nodes[1]} --gpus-per-node=8 " in said and int(nodes[1]) * 8 == ALL_GPUS[name]
    else:
        assert ALL_GPUS[name] == 8 and re.search(r"\b8 GPUs (?:of|with) 80 GB", said)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("areal")])
def test_the_papers_hyper_parameters(name):
    """Table 3 of arXiv 2505.24298, and what its appendix says of the small set-up."""
    _, config = load(next(path for path in CONFIGS if path.stem == name))
    controller, trainer, rollout, rewards = (config[part] for part in ("controller", "trainer", "rollout", "rewards"))
    assert (controller["batch_size"], controller["group_size"]) == (64 if "8gpu" in name else 512, 16)
    assert trainer["minibatches"] == 4 and trainer["max_grad_norm"] == 1.0
    assert (trainer["objective_args"]["clip_low"], trainer["objective_args"]["clip_high"]) == (0.2, 0.2)
    assert (trainer["learning_rate"], trainer["weight_decay"]) == (2e-5, 0.05)
    assert (trainer["beta1"], trainer["beta2"], trainer["epsilon"]) == (0.9, 0.95, 1e-5)
    assert [(score + rewards["offset"]) * rewards["scale"] for score in (1, 0)] == [5, -5]
    assert rollout["max_new_tokens"] == (8192 if "8gpu" in name else 27_648) and rollout["temperature"] == 1.0
    assert controller["max_staleness"] == (4 if "code" in name or "8gpu" in name else 8)
    assert trainer["kl_coef"] == 0.0 and trainer["objective"] == "decoupled_ppo"


def test_the_quick_start_trains_the_shipped_checkpoint():
    _, config = load(next(path for path in CONFIGS if path.stem == "quickstart"))
    folder = Path(config["model"])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    assert ModelConfig.from_hf(folder).family == "qwen2" and (folder / "tokenizer.json").exists()


def test_the_quick_start_is_evaluated_on_problems_that_it_never_trains_on():
    data = load(CONFIGS[[path.stem for path in CONFIGS].index("quickstart")])[1]["data"]
    assert data["train"].endswith(",held_out=0") and data["eval"].endswith(",held_out=1")
