"""`tools/export_hf.py` reads the parameters of a run's checkpoint, merges adapters, and says what is wrong."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models.sharding import make_mesh
from areal_jax.trainer import state
from areal_jax.trainer.checkpoint import Checkpoints
from areal_jax.trainer.config import TrainerConfig
from tests.models import tiny


@pytest.fixture(scope="module")
def tool():
    path = pathlib.Path(__file__).parents[2] / "tools/export_hf.py"
    spec = importlib.util.spec_from_file_location("export_hf_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of versions 3 and 4, with trained adapters; (folder, model, params of 4)."""
    base, base_params = tiny.model_and_params("qwen2-tied")
    models.export_hf(base, base_params, tmp_path / "start", dtype=jnp.float32)
    (tmp_path / "start/tokenizer.json").write_text("{}")
    config = TrainerConfig(lora_rank=2)
    model = base.with_(lora=models.Lora(2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape, np.float32)), model.abstract_params()
    )
    made = state.create(params, state.make_optimizer(config), make_mesh(jax.devices()[:1]))
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    memory = {"config": {"model": str(tmp_path / "start"), "trainer": {"lora_rank": 2}}}
    for version in (3, 4):
        scaled = jax.tree.map(lambda x: x * version, params)  # noqa: B023
        checkpoints.save(state.TrainState(scaled, made.opt_state, jnp.int32(version)), b"", memory, wait=True)
    checkpoints.close()
    return tmp_path, model, jax.tree.map(lambda x: x * 4, params)


def test_the_newest_checkpoint_becomes_a_folder(run, tool, capsys):
    folder, model, params = run
    assert tool.main([str(folder / "run"), "--out", str(folder / "out"), "--dtype", "float32"]) == 0
    assert "version 4" in capsys.readouterr().out
    _, again = models.load_hf(folder / "out")
    jax.tree.map(np.testing.assert_array_equal, again, models.merge_lora(model, params))
    assert (folder / "out/tokenizer.json").exists()
    assert tool.main([str(folder / "run"), "--out", str(folder / "out")]) == 2
    assert "exists" in capsys.readouterr().err
    assert tool.main([str(folder / "run"), "--out", str(folder / "other"), "--version", "7"]) == 2
    assert "no checkpoint of version 7" in capsys.readouterr().err
    assert tool.main([str(folder / "start"), "--out", str(folder / "other")]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    assert tool.main([str(folder / "run"), "--out", str(folder / "out/config.json/below")]) == 2
    assert "export_hf: error" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(folder / "run"), "--out", str(folder / "other"), "--dtype", "int8"])
