"""The judge of the fault injection can say no: each kind of wrong outcome is found, in a run's folder made by hand."""

import json
import os
import signal
import subprocess
import sys

import pytest

from areal_jax.metrics.trained import TrainedGroup
from areal_jax.weights import store
from tools.faults import harness, launcher
from tools.faults.harness import Fault, Run

PROMPTS, SIZE, GROUP = launcher.PROMPTS, launcher.TINY["controller.batch_size"], launcher.GROUP


def right():
    """(steps, summary) of a run as it must be."""
    steps = {
        version: [TrainedGroup(0, i, i, GROUP, version) for i in range(start, min(start + SIZE, PROMPTS))]
        for version, start in enumerate(range(0, PROMPTS, SIZE))
    }
    epoch = {"epoch": 0, "prompts": PROMPTS, "consumed": PROMPTS, "filtered": 0, "quarantined": 0}
    summary = {
        "trained_groups": PROMPTS, "trained_samples": PROMPTS * GROUP, "quarantined": 0, "steps": len(steps),
        "max_staleness": 1, "epochs": [epoch],
    }  # fmt: skip
    return steps, summary


def write(folder, steps, summary):
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    rows = [json.dumps({"version": version, "groups": groups}) + "\n" for version, groups in steps.items()]
    (folder / "trained.jsonl").write_text("".join(rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"step": version + 1, "actor/loss": 0.0}) + "\n" for version in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "export").mkdir()
    (folder / "export" / "model.safetensors").touch()
    return folder


def test_a_right_outcome_has_no_problems(tmp_path):
    assert list(harness.accounts(write(tmp_path / "run", *right()), quarantined=0)) == []


def twice(steps, summary):
    steps[3][0] = steps[2][0]._replace(group=99)


def lost(steps, summary):
    del steps[3][0]


def group_twice(steps, summary):
    steps[3][0] = steps[3][0]._replace(group=steps[2][0].group)


def short(steps, summary):
    steps[1][1] = steps[1][1]._replace(samples=GROUP - 1)


def old(steps, summary):
    steps[4][0] = steps[4][0]._replace(oldest=4 - launcher.BOUND - 1)


def gap(steps, summary):
    steps[9] = steps.pop(3)


def counted_less(steps, summary):
    summary["trained_samples"] -= 1


def counted_old(steps, summary):
    summary["max_staleness"] = launcher.BOUND + 1


def epoch_open(steps, summary):
    summary["epochs"] = []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (twice, "trained on more than once"), (lost, "never trained on"), (group_twice, "groups trained on more than"),
        (short, "without all their samples"), (old, "beyond the bound"), (gap, "not one after another"),
        (counted_less, "summary.json has"), (counted_old, "staleness of"), (epoch_open, "the ledger closed"),
    ],
)  # fmt: skip
def test_a_wrong_account_is_found(tmp_path, spoil, said):
    steps, summary = right()
    spoil(steps, summary)
    assert any(said in problem for problem in harness.accounts(write(tmp_path / "run", steps, summary), quarantined=0))


def test_a_secret_in_a_log_and_an_open_folder_are_found(tmp_path):
    workdir = write(tmp_path / "run", *right())
    for folder, name, text in (("keys", "client.secret", "s3cr3t"), ("logs", "trainer-0.log", "key s3cr3t!")):
        (workdir / folder).mkdir()
        (workdir / folder / name).write_text(text)
    assert ["trainer-0.log" in problem for problem in harness.secrets(workdir)] == [True]
    workdir.chmod(0o755)
    assert any("open to others" in problem for problem in harness.secrets(workdir))


def test_what_is_left_behind_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "GONE", 0.0)
    run = Run(Fault(role="trainer", action="kill"), tmp_path / "x", seed=0)
    write(run.workdir, *right())
    assert list(harness.left_behind(run)) == []
    program = "import signal; print('up', flush=True); signal.pause()"
    stray = subprocess.Popen([sys.executable, "-c", program], env=run.environment(), stdout=subprocess.PIPE)
    stray.stdout.readline()
    memory = store.make_private(store.run_folder(run.workdir))
    try:
        (memory / "v1").touch()
        (run.temporary / "verifier-1").mkdir()
        (run.workdir / "endpoints").mkdir()
        (run.workdir / "endpoints" / "controller").touch()
        found = " ".join(harness.left_behind(run))
        assert all(what in found for what in ("signal.pause()", "'v1'", "verifier-1", "endpoints/controller"))
    finally:
        os.kill(stray.pid, signal.SIGKILL)
        stray.communicate()
        (memory / "v1").unlink()
        memory.rmdir()
