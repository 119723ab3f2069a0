import json
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax.metrics.writers import MetricsWriter, read_metrics


def test_lines_are_json_and_flushed_at_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        values = {"a": jnp.float32(1.5), "b": np.int64(3), "hist": np.array([1, 2]), "who": "x", "bad": float("nan")}
        writer.write(7, values)
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 7, "a": 1.5, "b": 3, "hist": [1, 2], "who": "x", "bad": "nan"}


def test_a_resumed_run_appends_and_the_newest_line_of_a_step_counts(tmp_path):
    for start, name in ((0, "first"), (2, "second")):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            for step in range(start, start + 3):
                writer.write(step, {"who": name})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "eval/accuracy": 0.5}\n{"step": 5, "who"')  # killed in the middle of a line
    assert read_metrics(tmp_path)[-1]["step"] == 4
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {"who": "third"})
    rows = read_metrics(tmp_path)
    assert rows.pop() == {"step": 5, "who": "third"}
    assert rows[-1] == {"step": 4, "who": "second", "eval/accuracy": 0.5}
    assert [(row["step"], row["who"]) for row in rows] == [
        (0, "first"), (1, "first"), (2, "second"), (3, "second"), (4, "second"),
    ]  # fmt: skip


def test_tensorboard_gets_the_scalars(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5, "hist": [1, 2]})
    (events,) = os.listdir(tmp_path / "tensorboard")
    assert b"reward/mean" in (tmp_path / "tensorboard" / events).read_bytes()


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb, which keeps what it is told; `fails`: it has no network."""
    module = types.ModuleType("wandb")
    module.Error, module.fails, module.runs, module.logged = type("Error", (Exception,), {}), False, [], []

    def init(**options):
        if module.fails:
            raise module.Error("timed out\nafter 90 s")
        module.runs.append(options)
        defined = types.SimpleNamespace(define_metric=lambda *a, **k: module.logged.append((a, k)))
        defined.log, defined.finish = module.logged.append, lambda: None
        return defined

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_has_one_run_for_all_lives_and_no_secrets(tmp_path, wandb):
    config = {"seed": 1, "launch": {"restarts": 6, "env": {"WANDB_API_KEY": "secret"}}}
    for _ in range(2):
        with MetricsWriter(tmp_path, False, True, config=config) as writer:
            writer.write(3, {"reward/mean": 0.5})
            writer.write(2, {"eval/accuracy": 0.5})  # which ended late: wandb would drop what goes to an earlier step
    assert len({run["id"] for run in wandb.runs}) == 1 and {run["resume"] for run in wandb.runs} == {"allow"}
    assert "secret" not in str(wandb.runs) and wandb.runs[0]["config"]["launch"]["restarts"] == 6
    axis, *logged = wandb.logged[:3]
    assert axis == (("*",), {"step_metric": "step"})
    assert logged == [{"reward/mean": 0.5, "step": 3}, {"eval/accuracy": 0.5, "step": 2}]


def test_a_run_goes_on_without_weights_and_biases(tmp_path, wandb, caplog):
    wandb.fails = True
    with MetricsWriter(tmp_path, False, True) as writer:
        writer.write(1, {"reward/mean": 0.5})
    (said,) = caplog.messages
    assert "WANDB_MODE=offline" in said and "\n" not in said
    assert read_metrics(tmp_path) == [{"step": 1, "reward/mean": 0.5}]


def test_a_run_without_metrics_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == []
