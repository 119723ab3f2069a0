import errno
import io

import pytest
from rich.console import Console

from areal_jax.config import default_config, resolve
from areal_jax.launch import snapshot as snapshots
from areal_jax.launch import summary
from areal_jax.launch.view import StatusPoller, activity, screen, step_line, words

CONFIG = resolve(default_config())
ROWS = [
    {"step": i + 1, "reward/mean": 0.1 * i, "reward/accuracy": 0.1 * i, "staleness/max": i % 3,
     "staleness/hist": [3, 2, 1],
     "perf/gen_tokens_per_s": 1000.0 * i, "perf/train_tokens_per_s": 500.0, "time/train": 1.0, "time/step": 4.0,
     "batch/trained_tokens": 400}
    | ({"eval/accuracy": 0.25} if i == 0 else {})
    for i in range(10)
]  # fmt: skip
STATUS = {
    "queue_depth": 4, "running_groups": 11, "waiting_for": "rollout-0 (2 samples)",
    "roles": {
        "trainer": {"role": "trainer", "phase": "waiting:batch", "clock": {}, "gauges": {}, "heard": 9.0},
        "rollout-0": {"role": "rollout", "phase": "generating", "heard": 0.3, "version": 4, "running": 12, "slots": 64,
                      "clock": {"starting": 9.0, "generating": 3.0, "idle": 1.0}},
    },
}  # fmt: skip


def test_a_snapshot_gathers_both_sides():
    state = snapshots.snapshot(ROWS, STATUS, CONFIG)
    assert (state.step, state.steps, state.bound) == (10, 100, 4)
    assert state.accuracy[-1] == 0.9 and state.staleness == [30, 20, 10] and state.max_staleness == 2
    assert state.held_out == [(1, 0.25)]
    assert state.members[0] == snapshots.Member("rollout-0", "generating", 0.75, "version 4, 12 samples, 64 slots")
    assert state.members[1].detail == "silent for 9 s" and (state.queue, state.running) == (4, 11)


def test_nothing_known_yet_is_no_error():
    state = snapshots.snapshot([], {}, CONFIG)
    assert activity(state) == "starting"
    assert "step" in step_line(state)
    Console(file=io.StringIO()).print(screen(state, "x", 0.0, []))


def test_lines_and_screen_show_the_numbers():
    state = snapshots.snapshot(ROWS, STATUS, CONFIG)
    line = step_line(state)
    assert "step  10/100" in line and "accuracy  90.0%" in line and "generated 9,000 tokens/s" in line
    assert "trained 100 tokens/s" in line, "by the same clock: the wait for the batch counts"
    waits = "waits for rollout-0 (2 samples)"
    assert activity(state) == f"rollout-0 generating, trainer waits for batch; the next batch {waits}"
    text = io.StringIO()
    Console(file=text, width=120).print(screen(state, "quick start", 61.0, ["10:00:00 rollout-0 died"]))
    shown = ("10 of 100", "1:01", "25.0%", "9,000 tokens/s", "waits for batch", "bound 4", "rollout-0 died", waits)
    for expected in shown:
        assert expected in text.getvalue(), expected


def test_the_mismatch_of_engine_and_trainer_is_shown_with_its_warning(tmp_path, capsys):
    from areal_jax.launch.view import LineView
    from areal_jax.metrics.writers import MetricsWriter

    panel = {"mismatch/logprob_abs_diff_mean": 0.02, "mismatch_stale/logprob_abs_diff_mean": 0.3}
    row = {"reward/mean": 0.5} | panel | {"warning": "engine and trainer disagree at lag 0: it has a direction"}
    text = io.StringIO()
    Console(file=text, width=120).print(screen(snapshots.snapshot([{"step": 1} | row], {}, CONFIG), "x", 1.0, []))
    assert "2.0e-02 at lag 0, 3.0e-01 at lag > 0" in text.getvalue() and "it has a direction" in text.getvalue()
    view = LineView(CONFIG, tmp_path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, row)
        view.tick()
    assert "warning: engine and trainer disagree at lag 0" in capsys.readouterr().out


def test_lines_come_once_each_and_a_late_evaluation_is_not_lost(tmp_path, capsys):
    from areal_jax.launch.view import LineView
    from areal_jax.metrics.writers import MetricsWriter

    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"eval/accuracy": 0.25})
        view = LineView(CONFIG, tmp_path)  # a second start: this has been said
        writer.write(1, {"reward/mean": 0.5, "reward/accuracy": 0.5})
        writer.write(2, {"reward/mean": 0.7, "reward/accuracy": 0.7})
        view.tick()
        writer.write(1, {"eval/accuracy": 0.75})
        view.tick()
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [line[:12] for line in lines] == ["step   1/100", "step   2/100", "held-out acc"]
    assert lines[-1] == "held-out accuracy 75.0% with version 1"


@pytest.mark.parametrize("kind", ["lines", "none", "full"])
def test_an_output_on_a_full_disk_loses_lines_and_not_the_run(tmp_path, monkeypatch, kind):
    from areal_jax.launch.view import make_view
    from areal_jax.metrics.writers import MetricsWriter

    class Full(io.StringIO):
        lost = 0

        def write(self, text):
            self.lost += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    out, err = Full(), Full()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    view = make_view(CONFIG | {"metrics": CONFIG["metrics"] | {"view": kind}}, tmp_path)
    monkeypatch.setattr(view, "_status", StatusPoller(tmp_path, 60.0), raising=False)
    with MetricsWriter(tmp_path, tensorboard=False) as writer, view:
        writer.write(1, {"reward/mean": 0.5})
        view.tick()
        view.tell("rollout-0 is killed")
    assert out.lost or err.lost


def test_histograms_of_different_lengths_add_up():
    assert snapshots.histogram([{"staleness/hist": [4]}, {}, {"staleness/hist": [1, 0, 2]}]) == [5, 0, 2]


def test_sparkline_scales_and_averages():
    assert snapshots.sparkline([0.0, 1.0]) == "▁█"
    assert snapshots.sparkline([0.5], low=0.0, high=1.0) == "▅"
    assert snapshots.sparkline([0, 0, 1, 1], width=2) == "▁█"
    assert len(snapshots.sparkline(list(range(1000)), width=60)) == 60
    assert snapshots.sparkline([]) == "" and snapshots.sparkline([2.0, 2.0]) == "▁▁"


def test_the_summary_in_words(tmp_path):
    (tmp_path / "export").mkdir()
    values = {"accuracy_before": 0.31, "accuracy_after": 0.957, "trained_samples": 12800, "trainer_idle_fraction": 0.1}
    text = "\n".join(summary.lines(values, tmp_path, 185.2, 2))
    for expected in ("31.0% → 95.7%", "12,800", "10.0%", "3 min 05 s", "processes started again", "export"):
        assert expected in text, expected


def test_phases_in_words():
    assert words("waiting:controller") == "waits for controller" and words("loading_weights") == "loading weights"
