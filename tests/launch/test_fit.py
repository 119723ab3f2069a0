"""A model that does not fit is said in one line before the start, where the GPUs' memory is known."""

import json
import subprocess

import pytest

from areal_jax.config import ConfigError, default_config, resolve
from areal_jax.launch import fit
from areal_jax.models import ModelConfig

GIB = 2**30
SHAPE = ModelConfig(
    family="qwen2", vocab_size=152_064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
    mlp_size=18_944, qkv_bias=True,
)  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    config = default_config()
    config.model = str(tmp_path)
    config.rollout.update({"engine": "vllm", "workers": 4, "dtype": "bfloat16", "max_length": 16_384})
    config.launch.rollout_gpus = 1
    config.trainer.update({"row_length": 16_384, "rows": 4, "compute_dtype": "bfloat16", "remat": "attention"})
    return config


def test_seven_billion_parameters_on_eight_gpus(config):
    fit.check_memory(resolve(config), [80 * GIB] * 8)
    with pytest.raises(ConfigError, match=r"^the trainer needs about .* GiB \(parameters 14") as error:
        fit.check_memory(resolve(config), [80 * GIB] * 6)
    assert "on each of 2 GPUs of 80 GiB, of which JAX takes 75%" in str(error.value) and "\n" not in str(error.value)


def test_jax_may_be_given_more_of_a_gpu(config):
    with pytest.raises(ConfigError):
        fit.check_memory(resolve(config), [64 * GIB] * 8)
    config.launch.trainer_env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    fit.check_memory(resolve(config), [64 * GIB] * 8)


def test_nodes_that_only_train_have_all_their_gpus(config):
    config.update_from_flattened_dict({"launch.trainer_nodes": 1, "rollout.workers": 4, "trainer.row_length": 32_768})
    fit.check_memory(resolve(config), [80 * GIB] * 8, nodes=2)
    config.trainer.fsdp, config.trainer.rows = 16, 16
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        fit.check_memory(resolve(config), [80 * GIB] * 8, nodes=2)
    config.update_from_flattened_dict({"launch.trainer_nodes": 2, "trainer.processes": 2})
    fit.check_memory(resolve(config), [80 * GIB] * 8, nodes=3)


def test_an_engine_must_hold_the_weights_and_one_sequence(config):
    with pytest.raises(ConfigError, match=r"a rollout worker needs about .*weights 14\.2.* of 1 GPUs of 16 GiB"):
        fit.check_memory(resolve(config), [16 * GIB] * 4 + [80 * GIB] * 4)
    config.rollout.engine_args = {"tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"over 2 GPUs, and launch\.rollout_gpus gives a worker 1"):
        fit.check_memory(resolve(config), [80 * GIB] * 8)
    config.launch.rollout_gpus = 2
    fit.check_memory(resolve(config), [16 * GIB] * 8 + [80 * GIB] * 4)


def test_workers_that_would_share_a_gpu_unawares_are_refused(config):
    config.launch.rollout_gpus = 0
    with pytest.raises(ConfigError, match=r"4 rollout workers of one machine use the same GPU.*launch\.rollout_gpus"):
        fit.check_memory(resolve(config), [80 * GIB] * 8)
    config.rollout.engine_args = {"gpu_memory_utilization": 0.2}
    fit.check_memory(resolve(config), [80 * GIB] * 8)


def test_nothing_is_said_without_knowledge(config, monkeypatch):
    config.model = "/nowhere"
    fit.check_memory(resolve(config), [])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    fit.check_memory(resolve(config), [GIB])


LISTING = "0, GPU-aa, 81559\n1, GPU-bb, 81559\n2, GPU-cc, 40960\n"


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,2", [81559, 40960]), ("GPU-bb", [81559]), ("", []), ("MIG-1", []), ("7", [])]
)
def test_memory_of_the_gpus_that_may_be_used(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = subprocess.CompletedProcess([], 0, stdout=LISTING)
    monkeypatch.setattr(fit.subprocess, "run", lambda *arguments, **options: done)
    assert fit.gpu_memory() == [mebibytes << 20 for mebibytes in expected]


def test_no_driver_is_no_knowledge(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(fit.subprocess, "run", missing)
    assert fit.gpu_memory() == []
