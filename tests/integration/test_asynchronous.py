"""The quick start as a user runs it: asynchronous, learning, ended by Ctrl-C and gone on with. And real problems."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import ROOT, environment, launch, python, steps, unexplained

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
SUMMARY = {
    "accuracy_before", "accuracy_after", "wall_seconds", "trained_samples", "max_staleness", "staleness_bound",
    "dropped_stale", "recompiles_after_warmup", "trainer_idle_fraction", "rollout_idle_fraction",
    "generated_tokens_per_second",
}  # fmt: skip
STEPS = 30


def ctrl_c_after(workdir: Path, step: int, *settings: str) -> int:
    """Starts the run and interrupts it as a terminal does, once `step` is shown; the exit code."""
    command = [sys.executable, "-m", "areal_jax.launch", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    with subprocess.Popen(
        [*command, "--config.metrics.view=lines", *settings], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, process_group=0,
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="")
            if (shown := re.search(r"\bstep +(\d+)/", line)) and int(shown[1]) >= step:
                os.killpg(process.pid, signal.SIGINT)
                break
        print(process.stdout.read())
    return process.returncode


def processes_of(workdir: Path) -> list[str]:
    """Command lines of living processes that name `workdir`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if any(str(workdir) in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_start_learns_across_ctrl_c_and_keeps_its_promises(tmp_path):
    run = tmp_path / "run"
    settings = {"trainer__steps": STEPS, "trainer__eval_every": 0, "trainer__checkpoint_every": 4}
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    assert ctrl_c_after(run, 6, *flags) == 130
    assert processes_of(run) == []
    saved = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    assert saved >= 6 and not (run / "summary.json").exists()

    summary = launch(run, **settings)
    assert processes_of(run) == [] and summary.keys() >= SUMMARY
    assert summary["accuracy_before"] < 0.5 and summary["accuracy_after"] > summary["accuracy_before"] + 0.2
    assert summary["trained_samples"] == STEPS * 16 * 8 and summary["failed"] == {}
    assert 0 < summary["max_staleness"] <= summary["staleness_bound"] == 4
    assert summary["recompiles_after_warmup"] == 0
    assert 0 <= summary["trainer_idle_fraction"] <= 1 and 0 <= summary["rollout_idle_fraction"] <= 1

    rows = steps(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # the save came after the last report
    assert rows[0]["actor/ppo_kl"] == 0.0  # proximal log-probs are the policy's own, fused
    measured = [row for row in rows if row.get("mismatch/tokens")]  # tokens of lag 0
    assert measured and all(row["mismatch/logprob_abs_diff_mean"] < 1e-4 for row in measured)
    assert all(row["staleness/max"] <= 4 for row in rows)
    assert not unexplained(run)
    for row in rows:
        assert sum(row["staleness/hist"]) == row["batch/samples"] == 128
        assert row["time/step"] == pytest.approx(row["time/train"] + row["time/wait_for_batch"], abs=0.5)

    done = python("-m", "areal_jax.eval", f"--run={run}", timeout=300)
    again = json.loads((run / "eval" / "summary.json").read_text())
    assert done.returncode == 0 and again["accuracy"] == pytest.approx(summary["accuracy_after"], abs=1e-12)


@pytest.mark.slow
def test_what_few_runs_use_works_together(tmp_path):
    """Waiting at the bound, groups with something to learn alone, minibatches, a nucleus, an epoch that ends short."""
    summary = launch(
        tmp_path / "run", data__train="arithmetic:count=60,seed=1", data__eval="",
        controller__epochs=1, controller__batch_size=8, controller__group_size=4, controller__max_staleness=1,
        controller__over_age="wait", controller__dynamic_filter=True, rollout__workers=2, rollout__top_p=0.9,
        trainer__steps=50, trainer__eval_every=0, trainer__proximal="loglinear", trainer__minibatches=2,
    )  # fmt: skip
    rows = steps(tmp_path / "run")
    assert summary["filtered"] > 0 and summary["dropped_stale"] == 0 and summary["failed"] == {}
    assert summary["filtered"] + sum(row["batch/groups"] for row in rows) == 60
    assert len(rows) == summary["steps"] < 50 and [row["batch/groups"] for row in rows[:-1]] == [8] * (len(rows) - 1)
    assert all(row["reward/equal_groups"] == 0 and row["staleness/max"] <= 1 for row in rows)
    assert all("warning" not in row for row in rows), "sampling from a part is no fault of the engine"
    assert summary["recompiles_after_warmup"] == 0 and summary["skipped_updates"] == 0
    assert not unexplained(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason=f"needs the GSM8K file at {GSM8K}")
def test_real_gsm8k_problems_run_with_truthful_metrics(tmp_path):
    run = tmp_path / "run"
    summary = launch(
        run, config="configs/gsm8k_tiny.py", data__train=GSM8K, trainer__steps=3, launch__compile_cache="",
        rollout__max_new_tokens=32,
    )  # fmt: skip
    rows = steps(run)
    assert len(rows) == 3 and summary["trained_samples"] == 3 * 8 * 4 and summary["failed"] == {}
    assert sum(row["batch/trained_tokens"] for row in rows) == summary["trained_tokens"]
    for row in rows:
        assert 0 <= row["reward/accuracy"] < 0.2  # the network knows nothing but small sums
        assert 0 < row["length/mean"] <= row["length/max"] <= 32 and 0 <= row["length/truncated"] <= 1
        assert row["batch/tokens"] > 32 * 100  # prompts are GSM8K's, not sums of ten characters
        assert math.isfinite(row["actor/loss"]) and row["staleness/max"] <= 2
