"""What is wrong with the data is known before the start, and what is left out of it is said and counted."""

import json
import logging

import pytest

from areal_jax.config import ConfigError, resolve
from areal_jax.controller.__main__ import make_core
from areal_jax.launch import __main__ as launcher
from areal_jax.launch import summary, validate

GOOD = {"prompt": "1+1?", "answer": "2"}
NO_ANSWERS = [True, {"value": 6}, ["5"], "", " \n", float("nan"), float("inf"), "#### ", "\\boxed{}"]


def write(config, folder, *records):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config.data.train, config.data.eval = str(path), ""
    return config


@pytest.mark.parametrize(
    ("field", "answer"),
    [("prompt", None), *((field, answer) for field in ("prompt", "problem") for answer in NO_ANSWERS)],
    ids=repr,
)
def test_a_gold_answer_that_cannot_be_one_is_named_with_its_line(config, tmp_path, field, answer):
    write(config, tmp_path, {field: "1+1?", "answer": 2}, {field: "2+2?", "answer": answer})
    with pytest.raises(ConfigError, match=r"train.jsonl:2: bad record: verify_math: the gold answer must be text or a"):
        validate.validate(config)


def test_every_record_has_what_the_verifier_needs_and_no_more_is_asked(config, tmp_path):
    write(config, tmp_path, GOOD, {"prompt": "2+2?"})
    with pytest.raises(ConfigError, match=r"train.jsonl:2: bad record: verify_math needs \['answer'\]"):
        validate.validate(config)
    config.rewards.verifiers = ("areal_jax.rewards.shaping:format_penalty",)
    validate.validate(config)
    write(config, tmp_path, {"prompt": "p", "tests": ["assert f() == 1"], "answer": None}, {"prompt": "p"})
    config.rewards.verifiers = ("areal_jax.rewards:verify_code",)
    with pytest.raises(ConfigError, match=r"train.jsonl:2: bad record: verify_code needs \['tests'\]"):
        validate.validate(config)


def test_what_a_verifier_is_told_to_do_decides_what_it_needs(config, tmp_path):
    write(config, tmp_path, GOOD, {"prompt": "p", "answer": "x+1"})
    validate.validate(config)
    config.rewards.verifier_args = ({"mode": "last_number"},)
    with pytest.raises(ConfigError, match=r"train.jsonl:2: .*needs a number as gold answer, found 'x"):
        validate.validate(config)
    config.rewards.verifier_args = ({"answer": "7", "mode": "last_number"},)
    validate.validate(config)


class OwnWorkflow:
    """Gives the verifiers records of its own; must not be made by the launcher."""

    def __init__(self, turns: int = 1):
        raise AssertionError("the launcher made a user's workflow")

    async def run(self, session, record): ...


def test_a_workflow_of_ones_own_may_give_the_verifiers_another_record(config, tmp_path):
    write(config, tmp_path, {"prompt": "p"})
    config.rollout.workflow = f"{__name__}:OwnWorkflow"
    told = []
    validate.validate(config, told.append)
    assert len(told) == 1 and "cannot judge by 1 of 1 records, unless" in told[0] and "train.jsonl:1" in told[0]


def test_what_is_skipped_is_the_same_for_launcher_and_controller_and_counted(config, tmp_path, capsys, caplog):
    long = {"prompt": "1+" * 200, "answer": "2"}
    write(config, tmp_path, GOOD, {"prompt": "p", "answer": None}, {"prompt": "p", "answer": "1", "id": 2**64}, long)
    config.data.bad_record, config.data.too_long = "skip", "skip"
    told = []
    resolved = validate.validate(config, told.append)
    (line,) = told
    assert line.startswith("data.train: 3 records are left out, 1 are used; the first left out: ")
    assert "train.jsonl:2: verify_math" in line

    with caplog.at_level(logging.WARNING):
        core = make_core(resolved, 0, 0.0)
    assert [dict(record) for record in core.records] == [GOOD]
    assert "train.jsonl:2" in caplog.text and "train.jsonl:3: its 'id'" in caplog.text
    assert "train.jsonl:4: its prompt has 400 tokens" in caplog.text
    assert core.status(0.0)["skipped_records"] == 3 and core.finish(0.0)["skipped_records"] == 3


def test_the_launcher_says_what_is_left_out(config, tmp_path, capsys):
    write(config, tmp_path, GOOD, {"prompt": "p", "answer": None})
    file = tmp_path / "c.py"
    file.write_text(
        "from areal_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
        f"    c.model, c.data.train = {config.model!r}, {config.data.train!r}\n    return c\n"
    )
    options = [f"--config={file}", "--dry_run"]
    assert launcher.main(options) == 2
    assert "train.jsonl:2: bad record: verify_math: the gold answer" in capsys.readouterr().err
    assert launcher.main([*options, "--config.data.bad_record=skip"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("areal_jax: data.train: 1 record is left out, 1 are used;") and "train.jsonl:2" in first
    assert second == "areal_jax: 'run' can start"


def test_a_data_set_of_bad_records_only_names_the_first(config, tmp_path):
    write(config, tmp_path, {"prompt": "p"}, {"prompt": "q"})
    config.data.bad_record = "skip"
    with pytest.raises(ConfigError, match=r"is empty; all of its 2 records are bad, the first: .*train.jsonl:1"):
        validate.validate(config)


class Letters:
    """A tokenizer with one token per character."""

    chat_template = None

    def encode(self, text):
        return list(range(len(text)))


def test_every_prompt_is_measured_however_many_there_are(config, tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 25_000 + json.dumps({"prompt": "1+" * 100, "answer": "2"}) + "\n")
    config.data.train = str(path)
    monkeypatch.setattr(validate, "load_tokenizer", lambda folder: Letters())
    monkeypatch.setattr("areal_jax.data.prompts.MANY", 20_000)
    told = []
    with pytest.raises(ConfigError, match=r"1 of 25001 prompts are too long; .*train.jsonl:25001: its prompt has 200"):
        validate.check_data(resolve(config), told.append)
    assert told == ["data.train: measuring 25,001 prompts, which takes a while"]


def test_the_end_of_a_run_says_what_was_lost_and_only_that(tmp_path):
    lost = {
        "dropped_stale": 3, "dropped_stale_samples": 17, "skipped_records": 4, "filtered": 5, "quarantined": 6,
        "failed": {"verifier_timeout": 1200, "worker_lost": 2},
    }  # fmt: skip
    text = "\n".join(summary.lines(lost, tmp_path, 1.0, 0))
    found = {line.strip().rpartition("  ")[0].strip(): line.rpartition("  ")[2] for line in text.splitlines()}
    assert found["groups dropped as stale"] == "3"
    assert found["records of the data left out"] == "4" and found["groups filtered out"] == "5"
    assert found["prompts given up (quarantined)"] == "6"
    assert found["tries of samples that failed"] == "1,200 verifier_timeout, 2 worker_lost"
    nothing = dict.fromkeys(lost, 0) | {"failed": {}}
    quiet = "\n".join(summary.lines(nothing, tmp_path, 1.0, 0))
    assert not any(word in quiet for word in ("left out", "filtered", "quarantined", "failed"))
