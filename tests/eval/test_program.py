"""The program as people start it, on the shipped checkpoint: settings, files, table, and errors in one line."""

import json
from pathlib import Path

import pytest

from areal_jax import config as configs
from areal_jax.controller.__main__ import make_core
from areal_jax.eval import __main__ as program

TOY = Path(__file__).parents[2] / "configs" / "toy"


@pytest.mark.slow
def test_the_shipped_checkpoint_is_evaluated(tmp_path, capsys):
    options = [f"--model={TOY}", "--data=arithmetic:count=12,seed=3,max_terms=4", f"--out={tmp_path}/e"]
    options += ["--samples=4", "--temperature=1.0", "--ks=1,4", "--max_new_tokens=40", "--config.rollout.slots=16"]
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "e/problems.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12)) and summary["samples"] == 48
    right = [line["right"] for line in lines]
    assert 0 < sum(right) < 48  # the checkpoint is made to be right on some
    estimates = summary["estimates"]
    assert list(estimates) == ["avg@4", "pass@1", "pass@4"]
    assert estimates["pass@1"]["value"] == pytest.approx(sum(right) / 48) == summary["accuracy"]
    assert estimates["pass@4"]["value"] == pytest.approx(sum(n > 0 for n in right) / 12)
    for word in ("pass@4", "95 % interval", "bootstrap over problems", "12 problems, 48 scored samples"):
        assert word in printed
    for line in lines:  # what is counted as right says the right answer
        for sample in line["samples"]:
            assert (sample["completion"].rpartition("####")[2] == line["answer"]) == (sample["accuracy"] == 1.0)
    assert program.main(options) == 2 and "holds the results of an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model"], "write --option=value"),
        (["--modle=x"], "unknown option --modle"),
        (["--run=r", "--config=c"], "either --run or --config"),
        (["--config.rollout.slot=3", "--out=o"], "did you mean 'rollout.slots'"),
        (["--model=m"], "no folder for the results"),
        (["--model=/nowhere", "--out=o"], "'/nowhere' does not exist"),
        ([f"--model={TOY}", "--out=o"], "no data to evaluate on"),
        ([f"--model={TOY}", "--out=o", "--data=/no.jsonl"], "'/no.jsonl' does not exist"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--ks=2"], "between 1 and --samples=1"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--ks=a"], "write whole numbers"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--verifier=no.such:f"], "does not import"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--samples=0"], "must be at least 1"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--temperature=-1"], "must be at least 0"),
        ([f"--model={TOY}", "--out=o", "--data=arithmetic:count=4", "--samples=4"], "the same answer 4 times"),
        (["--run=/nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_and_its_evaluation_take_the_same_problems_and_say_how_many(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1+" * n, "answer": "1"}) + "\n" for n in (3, 40, 5, 6)))
    config = configs.default_config()
    config.model = str(TOY)
    config.data.update({"train": str(path), "eval": str(path), "eval_limit": 2, "too_long": "skip"})
    config.rollout.update({"max_length": 50, "max_new_tokens": 30})
    config = configs.resolve(config)
    mine = program.records_of(config, program.load_tokenizer(str(TOY)))
    assert [record["prompt"].count("1") for record in mine] == [3, 5]
    left_out, limited = capsys.readouterr().err.splitlines()
    assert "d.jsonl:2: its prompt has" in left_out and "the first 2 of 3 problems" in limited
    assert make_core(config, 0, 0.0).evaluations._records == mine


def test_a_runs_settings_are_taken_over(tmp_path):
    config = configs.default_config()
    config.rollout.workflow_args = {"feedback": "no"}
    config.rewards.verifier_args = ({"mode": "boxed"},)
    configs.save(config, tmp_path)
    found, own = program.settings_of([f"--run={tmp_path}", "--samples=8", "--config.rollout.workflow_args.right=0.5"])
    assert found["model"] == str(tmp_path / "export") and own == {"run": str(tmp_path)}
    assert found["rollout"]["workflow_args"] == {"feedback": "no", "right": 0.5}
    assert found["rewards"]["verifier_args"] == ({"mode": "boxed"},)
    assert found["controller"]["eval_samples_per_prompt"] == 8
    found, _ = program.settings_of(["--verifier=a:b", "--model=m"])
    assert (found["rewards"]["verifiers"], found["rewards"]["weights"]) == (("a:b",), (1.0,))
