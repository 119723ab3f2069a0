"""Every mistake that can be known before the start is one line that names it; nothing is started or written."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from areal_jax.config import ConfigError
from areal_jax.launch import __main__ as launcher
from areal_jax.launch import validate

ROOT = Path(__file__).parents[2]


def test_a_good_config_is_returned_resolved(config):
    resolved = validate.validate(config)
    assert resolved["trainer"]["steps"] == 100 and resolved["model"] == config.model


def broken(config, key, value):
    section, _, name = key.rpartition(".")
    node = config[section] if section else config
    with node.ignore_type():
        node[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("controller.group_size", 0, "controller.group_size=0 must be at least 1"),
        ("controller.group_size", 1, "group-relative advantage 0"),
        ("controller.max_staleness", -1, "controller.max_staleness=-1 must be at least 0"),
        ("controller.over_age", "keep", "must be one of drop, wait"),
        ("trainer.objective", "decoupled_pp", "trainer.objective='decoupled_pp' is unknown"),
        ("trainer.objective_args", {"clip": 3}, "'decoupled_ppo' has no such argument"),
        ("trainer.learning_rate", 0.0, "trainer.learning_rate=0.0 must be greater than 0"),
        ("trainer.steps", "x", "'trainer.steps' must be a whole number"),
        ("trainer.row_length", 100, "rollout.max_length=256 is longer than trainer.row_length=100"),
        ("trainer.fsdp", 0, "trainer.fsdp=0"),
        ("trainer.remat", "some", "'some' is unknown; it must be one of none, full, attention"),
        ("trainer.max_segments", -1, "trainer.max_segments=-1 must be at least 0"),
        ("trainer.tensor", -1, "only one of"),
        ("rollout.max_new_tokens", 256, "leaves no room for a prompt"),
        ("rollout.temperature", 0.0, "nothing to explore"),
        ("rollout.engine", "sglang", "must be one of jax, vllm"),
        ("rollout.max_length", 4096, "trainer.row_length"),
        ("rollout.workflow", "areal_jax.rollout.workflows:Nothing", "rollout.workflow"),
        ("rollout.python", "/nowhere/python", "rollout.python='/nowhere/python' is not an executable file"),
        ("rewards.verifiers", ("no.such.module:f",), "'no.such.module:f' does not import: ModuleNotFoundError"),
        ("rewards.verifiers", (), "rewards.verifiers is empty"),
        ("rewards.verifier_args", ({"mod": "boxed"},), "verify_math does not take mod; it takes completion"),
        ("rewards.verifiers", ("areal_jax.rewards:verify_code",), "verify_code needs ['tests']; the record has"),
        ("rewards.weights", (1.0, 2.0), "rewards.weights has 2 entries for 1 verifiers"),
        ("rewards.address", "127.0.0.1:80", "is not an address"),
        ("controller.address", "tcp://127.0.0.1:70000", "is not an address"),
        ("controller.heartbeat_seconds", 30.0, "heartbeat_limit=30 must be longer than controller."),
        ("seed", 2**63, "seed=9223372036854775808 must be a number of 64 bits"),
        ("trainer.seed", -1, "trainer.seed=-1 must be at least 0"),
        ("model", "", "no model given"),
        ("model", "/nowhere", "the model folder '/nowhere' does not exist"),
        ("data.train", "", "no data set given"),
        ("data.train", "/nowhere.jsonl", "data.train: the data set '/nowhere.jsonl' does not exist"),
        ("data.max_prompt_tokens", 5, "are too long; the first: arithmetic:count=64 record"),
        ("data.template", "chat", "the checkpoint's tokenizer has none"),
    ],
)
def test_a_mistake_is_named(config, key, value, message):
    with pytest.raises(ConfigError) as error:
        validate.validate(broken(config, key, value))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fused_proximal_needs_one_minibatch(config):
    config.trainer.proximal, config.trainer.minibatches = "fused", 4
    with pytest.raises(ConfigError, match="exact with one minibatch only"):
        validate.validate(config)


def test_more_minibatches_than_groups_are_refused(config):
    config.trainer.proximal, config.trainer.minibatches = "recompute", config.controller.batch_size + 1
    with pytest.raises(ConfigError, match="groups of a batch, which stay whole"):
        validate.validate(config)


def test_a_malformed_line_is_named_unless_it_may_be_skipped(config, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": "1+\n')
    config.data.train = str(path)
    with pytest.raises(ConfigError, match=r"train.jsonl:2: bad record: not valid JSON"):
        validate.validate(config)
    config.data.bad_record = "skip"
    validate.validate(config)
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        validate.validate(config)


def test_long_prompts_may_be_skipped_but_not_all(config, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1+" * n, "answer": "2"}) + "\n" for n in (1, 2, 100)))
    config.data.train, config.data.too_long = str(path), "skip"
    validate.validate(config)
    config.data.max_prompt_tokens = 1
    with pytest.raises(ConfigError, match="all 3 prompts"):
        validate.validate(config)


def test_the_choices_are_those_of_the_models():
    """The launcher names them itself, so as not to need jax."""
    from areal_jax.models import attention, huggingface, model

    assert set(validate.TOKENIZER_FILES) <= set(huggingface.COPIED)  # what is asked for is exported
    assert set(validate._CHOICES["trainer.remat"]) == set(model.REMAT)
    assert set(validate._CHOICES["trainer.layers"]) == set(model.LAYERS)
    assert set(validate._CHOICES["trainer.attention"]) == set(attention.IMPLEMENTATIONS)


def test_an_expert_axis_needs_experts(config):
    config.trainer.expert = 2
    with pytest.raises(ConfigError, match=r"trainer\.expert=2 splits nothing"):
        validate.validate(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"no \*.safetensors in"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_checkpoint_must_be_whole(config, tmp_path, name, message):
    folder = tmp_path / "m"
    shutil.copytree(config.model, folder)
    (folder / name).unlink()
    config.model = str(folder)
    with pytest.raises(ConfigError, match=message):
        validate.validate(config)


def test_every_file_of_weights_must_be_there_and_whole(config, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(config.model, folder)
    config.model = str(folder)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[:-1], weights[:100], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"model.safetensors' is no whole file of weights \(.*\): did its"):
            validate.validate(config)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00001-of-00002.safetensors").write_bytes(weights)
    index, shards = folder / "model.safetensors.index.json", {"a": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    validate.validate(config)
    index.write_text(json.dumps({"weight_map": shards | {"b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match=r"is not whole: model-00002-of-00002.safetensors \(named by"):
        validate.validate(config)
    index.write_text("{")
    with pytest.raises(ConfigError, match=r"index.json' is not the index of a checkpoint: JSONDecodeError"):
        validate.validate(config)


def test_the_context_and_the_tokenizer_must_fit_the_model(config, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(config.model, folder)
    config.model = str(folder)
    values = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"max_position_embeddings": 64}, "longer than the model's context of 64"),
        ({"vocab_size": 100}, "they do not match"),
        ({"architectures": ["GPT9"]}, "'GPT9' is not implemented"),
    ]:
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=message):
            validate.validate(config)


def test_a_port_in_use_is_named(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.controller.address = f"tcp://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"controller.address: port {port} of 127.0.0.1"):
            validate.validate(config)


def test_the_command_line_says_one_line_and_exits_with_2(checkpoint, tmp_path, capsys, monkeypatch):
    file = tmp_path / "c.py"
    file.write_text(
        "from areal_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
        f"    c.model = {str(checkpoint)!r}\n    c.data.train = 'arithmetic:count=64'\n    return c\n"
    )
    workdir = tmp_path / "run"
    options = [f"--config={file}", f"--workdir={workdir}"]
    assert launcher.main([*options, "--config.controller.group_size=0"]) == 2
    error = capsys.readouterr().err
    assert error == "areal_jax: error: controller.group_size=0 must be at least 1\n" and not workdir.exists()

    assert launcher.main([*options, "--dry_run"]) == 0 and not workdir.exists()
    assert launcher.main([*options, "--prepare"]) == 0
    assert json.loads((workdir / "config.json").read_text())["model"] == str(checkpoint)
    modes = [oct(path.stat().st_mode)[-3:] for path in (workdir, workdir / "keys/client.secret")]
    assert modes == ["700", "600"]
    assert launcher.main([*options, "--prepare"]) == 0  # again is no error
    others = ["--config.rollout.workers=3", "--config.trainer.data_parallel=-1", "--config.trainer.fsdp=1"]
    others += ["--config.controller.disk_limit=60"]
    assert launcher.main([*options, *others, "--prepare"]) == 0  # nor are other workers, another mesh or another limit
    assert json.loads((workdir / "config.json").read_text())["rollout"]["workers"] == 3
    capsys.readouterr()
    assert launcher.main([*options, "--config.trainer.learning_rate=1.0"]) == 2
    assert "holds a run with trainer.learning_rate=2e-05, not 1.0" in capsys.readouterr().err
    assert launcher.main([f"--config={file}", f"--workdir={tmp_path}"]) == 2
    assert "holds something that is not a run" in capsys.readouterr().err


def test_the_program_itself_prints_no_traceback(tmp_path):
    command = [sys.executable, "-m", "areal_jax.launch", "--config=nowhere.py", f"--workdir={tmp_path}/r"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "areal_jax: error: the config file 'nowhere.py' does not exist\n"
