import dataclasses
import json

import pytest

from areal_jax import config as configs
from areal_jax.rewards.config import RewardsConfig
from areal_jax.trainer.config import TrainerConfig


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = configs.default_config()
    config.rollout.workflow_args = {"turns": 2, "inner": {"a": 1.5}}
    config.rewards.verifier_args = ({"mode": "boxed"},)
    config.trainer.learning_rate = 1  # a whole number where a float is wanted
    configs.save(config, tmp_path)
    loaded = configs.load(tmp_path)
    assert loaded == configs.resolve(config)
    assert loaded["rewards"]["verifier_args"] == ({"mode": "boxed"},)
    assert type(loaded["trainer"]["learning_rate"]) is float


def test_every_section_becomes_its_dataclass_again():
    config = configs.resolve(configs.default_config())
    for name, cls in configs.SECTIONS.items():
        assert configs.section(cls, config[name]) == cls()


def test_an_unknown_key_is_named_with_the_nearest_one():
    with pytest.raises(configs.ConfigError, match=r"unknown key 'trainer.learn_rate'; did you mean 'trainer.learning"):
        configs.section(TrainerConfig, {"learn_rate": 1.0})
    with pytest.raises(configs.ConfigError, match=r"unknown key 'trainr'; did you mean 'trainer'\?"):
        configs.resolve({"trainr": {}})
    with pytest.raises(AttributeError, match="learn_rate"):
        configs.default_config().trainer.learn_rate = 1.0


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (TrainerConfig, "steps", 1.5),
        (TrainerConfig, "steps", True),
        (TrainerConfig, "learning_rate", "1e-4"),
        (TrainerConfig, "objective", 3),
        (RewardsConfig, "weights", "1.0"),
    ],
)
def test_a_wrong_type_is_named(cls, key, value):
    with pytest.raises(configs.ConfigError, match=rf"\.{key}' must be"):
        configs.section(cls, {key: value})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.section(TrainerConfig, {}).steps = 3


def test_a_folder_without_config_says_how_to_start(tmp_path):
    with pytest.raises(configs.ConfigError, match="does not exist: start the run with"):
        configs.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {}})[:-2])
    with pytest.raises(configs.ConfigError, match="not valid JSON"):
        configs.load(tmp_path)
