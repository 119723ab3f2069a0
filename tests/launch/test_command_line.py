import pytest

from areal_jax.config import ConfigError, resolve
from areal_jax.launch.command_line import parse


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from areal_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.trainer.steps = 7\n    return c\n"
    )
    return f"--config={path}"


def test_settings_are_changed_in_their_own_types(file):
    command = parse([
        file, "--config.trainer.steps=9", "--config.trainer.learning_rate", "3", "--config.controller.shuffle=false",
        "--config.rewards.verifiers=('m:f', 'm:g')", "--config.rewards.weights=1.0", "--config.name=5",
        "--config.rollout.engine_args.a.b=x", "--config.rollout.engine_args.n=3",
        "--config.rollout.workflow_args={'k': 1}", "--workdir=a", "--workdir=b", "--dry_run",
    ])  # fmt: skip
    config = resolve(command.config)
    assert (command.workdir, command.dry_run, command.prepare) == ("b", True, False)
    assert config["trainer"]["steps"] == 9 and config["trainer"]["learning_rate"] == 3.0
    assert config["controller"]["shuffle"] is False and config["name"] == "5"
    assert config["rewards"]["verifiers"] == ("m:f", "m:g") and config["rewards"]["weights"] == (1.0,)
    assert config["rollout"]["engine_args"] == {"a": {"b": "x"}, "n": 3}
    assert config["rollout"]["workflow_args"] == {"k": 1}


def test_one_text_is_a_tuple_of_one(file):
    command = parse([file, "--config.rewards.verifiers=my_task:reward"])
    assert resolve(command.config)["rewards"]["verifiers"] == ("my_task:reward",)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.trainer.lerning_rate=1", "'trainer.lerning_rate'; did you mean 'trainer.learning_rate'?"),
        ("--config.trainr.steps=1", "unknown key 'trainr'; did you mean 'trainer'?"),
        ("--config.trainer.steps=many", "'trainer.steps' must be of type int, and 'many' is not"),
        ("--config.trainer.steps.x=1", "'trainer.steps' is not a group of settings"),
        ("--config.metrics.tensorboard=2", "must be True or False"),
        ("--confg=x", "unknown option --confg"),
        ("x", "'x' is not understood"),
        ("--workdir", "--workdir needs a value"),
        ("--config=none.py", "the config file 'none.py' does not exist"),
    ],
)
def test_a_mistake_is_one_line(file, argument, message):
    with pytest.raises(ConfigError) as error:
        parse([file, argument])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.trainer.lerning_rate = 1", "unknown key 'lerning_rate'; did you mean 'trainer.learning_rate'? (in "),
        ("c.trainer.steps = 'x'", "raises TypeError"),
        ("c = 3", "returns a int, not a ConfigDict"),
        ("1 / 0", "raises ZeroDivisionError: division by zero"),
        ("{}['a']", "raises KeyError"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, body, message):
    path = tmp_path / "c.py"
    head = "from areal_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    path.write_text(f"{head}    {body}\n    return c\n")
    with pytest.raises(ConfigError) as error:
        parse([f"--config={path}"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_config_and_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no config given"):
        parse([])
    (tmp_path / "c.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"defines no get_config\(\)"):
        parse([f"--config={tmp_path}/c.py"])
    assert parse(["--help"]) is None
