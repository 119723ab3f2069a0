import sys
from pathlib import Path

import pytest

from areal_jax import models
from areal_jax.config import default_config
from tests.models import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder with random weights and the byte-level tokenizer."""
    import make_toy_checkpoint as toy

    folder = tmp_path_factory.mktemp("model") / "m"
    tokenizer = toy.make_tokenizer()
    model = models.Model(toy.model_config(tokenizer, width=16, layers=1, heads=2))
    models.export_hf(model, tiny.random_params(model), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(checkpoint):
    config = default_config()
    config.model = str(checkpoint)
    config.data.train = "arithmetic:count=64"
    config.data.eval = "arithmetic:count=16,seed=1"
    return config
