import json
import os

import jax.numpy as jnp
import numpy as np

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


def test_a_run_without_metrics_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == []
