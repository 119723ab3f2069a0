"""Whole runs with several turns and with tools: what is trained on was sampled by the engine; evaluation agrees."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from letters import ALPHABET, make_checkpoint

from areal_jax.config import default_config, resolve
from areal_jax.data.readers import load_dataset
from areal_jax.launch import session
from areal_jax.launch.logs import log_tail
from areal_jax.launch.roles import roles_of
from areal_jax.launch.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    "single_turn": ("areal_jax.rollout.workflows:SingleTurn", {}),
    "multi_turn": ("areal_jax.rollout.workflows:MultiTurn", {"feedback": "?", "max_turns": 3}),
    "tool_use": (
        "areal_jax.rollout.tools:ToolUse",
        {"open": "=", "close": ";", "output": "#{output}#", "max_output_tokens": 4, "max_calls": 2, "timeout": 2},
    ),
}


def config_of(tmp_path, workflow: str, engine: str = "jax", verifier: str = "parity", **changes) -> dict:
    """The settings of a run of two steps with a tiny random checkpoint, and `changes` (section__key=value)."""
    config = default_config()
    config.model = make_checkpoint(tmp_path / "model")
    config.data.update({"train": "arithmetic:count=64", "eval": "arithmetic:count=24,seed=9", "template": "none"})
    config.rewards.verifiers = (f"tests.integration.judges:{verifier}",)
    config.rewards.update({"scale": 10.0, "offset": -0.5})
    config.controller.update({"batch_size": 4, "group_size": 4, "max_staleness": 2})
    config.rollout.update({"engine": engine, "slots": 8, "max_length": 64, "max_new_tokens": 24})
    config.rollout.workflow = WORKFLOWS[workflow][0]
    config.rollout.workflow_args = WORKFLOWS[workflow][1]
    config.trainer.update({"steps": 2, "proximal": "fused", "row_length": 64, "rows": 4, "learning_rate": 1e-3})
    config.metrics.update({"tensorboard": False, "view": "none"})
    for name, value in changes.items():
        part, _, key = name.partition("__")
        config[part][key] = value
    return resolve(config)


def run_recorded(tmp_path, *arguments, **changes) -> Path:
    """A run by the launcher's own supervisor, with recording roles; returns its folder."""
    config, run = config_of(tmp_path, *arguments, **changes), tmp_path / "run"
    session.prepare(config, run)
    roles, leaders = roles_of(config, run)
    for i, role in enumerate(roles):
        if (kind := role.name.partition("-")[0]) in ("trainer", "rollout"):
            command = (sys.executable, str(ROOT / "tests/integration/recording.py"), kind, *role.command[3:])
            roles[i] = dataclasses.replace(role, command=command, restarts=0)
    outcome = Supervisor(roles, leaders, run, grace=30.0).run(lambda: None)
    assert outcome.status == "finished", (outcome, [log_tail(path) for path in (run / "logs").glob("*.log")])
    return run


def completions_of(run: Path) -> dict:
    """What the engine gave out: {(whole prefix up to the completion's end): completion}, for training only."""
    found = defaultdict(list)
    for line in (run / "recorded/completions.jsonl").read_text().splitlines():
        given = json.loads(line)
        if given["key"][1] >= 0:
            found[tuple(given["prompt"])].append(given)
    return found


def sequences_of(run: Path) -> list[dict[str, np.ndarray]]:
    """What the trainer put on its devices, one sequence after another."""
    sequences = []
    for path in sorted((run / "recorded").glob("step-*.npz")):
        arrays = dict(np.load(path))
        for i in range(arrays["sequence_ids"].max() + 1):
            where = arrays["sequence_ids"] == i
            assert (np.diff(arrays["positions"][where]) == 1).all()
            sequences.append({name: array[where] for name, array in arrays.items()})
    return sequences


def turns(mask: np.ndarray) -> list[slice]:
    """The stretches of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2])]


def check_trained_is_sampled(run: Path) -> list[dict[str, np.ndarray]]:
    """Every stretch of trained tokens is the beginning of one completion of the tokens before it, to the last bit."""
    completions, sequences = completions_of(run), sequences_of(run)
    for sequence in sequences:
        assert sequence["mask"].any() and not sequence["mask"][0]
        for where in turns(sequence["mask"]):
            sampled = []
            position = where.start
            while position < where.stop:  # a stretch may consist of several completions, one right after another
                stretch = slice(position, where.stop)
                fitting = [
                    given
                    for given in completions[tuple(sequence["tokens"][:position].tolist())]
                    for n in [min(len(given["tokens"]), where.stop - position)]
                    if given["tokens"][:n] == sequence["tokens"][stretch][:n].tolist()
                    and given["versions"][:n] == sequence["versions"][stretch][:n].tolist()
                    and np.float32(given["logprobs"][:n]).tolist()
                    == sequence["behavior_logprobs"][stretch][:n].tolist()
                ]
                assert fitting, "trained tokens that no completion of the engine explains"
                sampled.append(fitting[0])
                position += len(fitting[0]["tokens"])
        outside = ~sequence["mask"]
        assert (sequence["versions"][outside] == -1).all() and (sequence["behavior_logprobs"][outside] == 0).all()
        assert (sequence["advantages"][outside] == 0).all()
    return sequences


def check_evaluation_agrees(run: Path, failed: int = 0) -> dict:
    """Evaluating the exported checkpoint gives the accuracy that the run reported at its end, and the same failures."""
    command = [sys.executable, "-m", "areal_jax.eval", f"--run={run}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    found = json.loads((run / "eval/summary.json").read_text())
    reported = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/accuracy" in line][-1]
    assert found["failed"] == last["eval/failed"] == failed
    assert found["samples"] == last["eval/samples"] == 24 - failed
    assert found["accuracy"] == pytest.approx(reported["accuracy_after"], abs=1e-12)
    assert 0 < found["accuracy"] < 1 and f"{found['accuracy']:.2%}" in printed
    for name in ("reward", "tokens", "truncated"):
        assert found[name] == pytest.approx(last[f"eval/{name}"], abs=1e-6)
    return found


ENGINES = [
    "jax",
    pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.skipif(
        getattr(importlib.util.find_spec("vllm"), "origin", None) is None, reason="vLLM is not installed"
    )]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_several_turns(tmp_path, engine):
    run = run_recorded(tmp_path, "multi_turn", engine)
    sequences = check_trained_is_sampled(run)
    assert len(sequences) == 2 * 16
    assert max(len(turns(s["mask"])) for s in sequences) >= 2  # there were second tries
    found = check_evaluation_agrees(run)
    assert found["metrics"]["turns"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_tools(tmp_path, engine):
    run = run_recorded(tmp_path, "tool_use", engine, trainer__steps=4)  # enough samples for some to call
    sequences = check_trained_is_sampled(run)
    assert len(sequences) == 4 * 16
    assert max(len(turns(s["mask"])) for s in sequences) >= 2  # a tool's output stands between them
    found = check_evaluation_agrees(run)
    assert found["metrics"]["tool_calls"] >= 0  # greedily, this network may never call


@pytest.mark.slow
def test_a_verifiers_error_is_never_a_score_and_shaping_is_not_accuracy(tmp_path):
    """The verifier breaks on every third problem: those are dropped by name, in the run and in evaluations."""
    run = run_recorded(tmp_path, "single_turn", verifier="touchy")
    sequences = check_trained_is_sampled(run)
    assert len(sequences) == 2 * 16
    for sequence in sequences:
        prompt = "".join(ALPHABET[token] for token in sequence["tokens"][~sequence["mask"]])
        assert sum(map(int, prompt.removesuffix("?").split("+"))) % 3
    evaluated = load_dataset("arithmetic:count=24,seed=9")
    broken = sum(int(evaluated[i]["answer"]) % 3 == 0 for i in range(24))
    found = check_evaluation_agrees(run, failed=broken)
    assert found["failures"] == {"verifier_exception": broken} and broken > 0
    assert found["reward"] == pytest.approx(10 * (found["accuracy"] - 0.01 * characters(run) - 0.5))
    reported = json.loads((run / "summary.json").read_text())
    assert reported["failed"]["verifier_exception"] >= 3  # each sample is tried three times, then its prompt goes
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "reward/mean" in step]
    assert len(trained) == 2 and all(0 <= step["reward/accuracy"] <= 1 for step in trained)
    assert all(step["reward/mean"] < 10 * (step["reward/accuracy"] - 0.5) for step in trained)


@pytest.mark.slow
def test_an_evaluation_beside_training_keeps_its_version_and_stops_nobody(tmp_path):
    """Seen in the order in which two workers' engines gave out completions, and in the versions of the tokens.

    One evaluation is made to last until training has got on beside it: if that cannot be, the run does not end well.
    """
    settings = {"trainer__steps": 12, "trainer__eval_every": 3, "rollout__workers": 2, "rollout__eval_temperature": 1.0}
    settings["launch__rollout_env"] = {"HOLD_EVALUATIONS": "3 6"}  # later ones may need no newer tokens to the end
    run = run_recorded(tmp_path, "single_turn", controller__eval_samples_per_prompt=4, **settings)
    given = [json.loads(line) for line in (run / "recorded/completions.jsonl").read_text().splitlines()]
    evaluating = [line["key"][1] < 0 for line in given]
    assert all(len(set(line["versions"])) == 1 for line, of_evaluation in zip(given, evaluating) if of_evaluation)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "eval/accuracy" in line]
    assert {0, 12} < set(evaluated)
    went_on = newer = 0
    for version in evaluated:
        places = [i for i, line in enumerate(given) if evaluating[i] and line["versions"][0] == version]
        assert len(places) == 24 * 4
        meanwhile = [line for line, e in zip(given[places[0] : places[-1]], evaluating[places[0] :]) if not e]
        went_on += bool(meanwhile)
        newer += any(max(line["versions"]) > version for line in meanwhile)
    assert (run / "recorded/held").exists()
    assert went_on  # not beside every one: at its bound of staleness, training may have nothing to ask for
    assert newer  # while an evaluation ran, training went on, and a worker got what it made


@pytest.mark.slow
def test_on_error_stop_ends_the_run_with_the_verifiers_own_words(tmp_path, capsys):
    changes = {"rewards__on_error": "stop", "controller__max_attempts": 10**6}  # dropping would go on for ever
    config, run = config_of(tmp_path, "single_turn", verifier="touchy", **changes), tmp_path / "run"
    session.prepare(config, run)
    assert session.run(config, run) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("areal_jax: the run failed: ") and "rewards.on_error is 'stop'" in last
    assert "verifier_exception" in last and "is not to be judged" in last
    assert not (run / "summary.json").exists()


def characters(run: Path) -> float:
    """The mean length of the judged completions of an evaluation, in characters."""
    lines = [json.loads(line) for line in (run / "eval/problems.jsonl").read_text().splitlines()]
    lengths = [len(s["completion"]) for line in lines for s in line["samples"] if "completion" in s]
    return sum(lengths) / len(lengths)
