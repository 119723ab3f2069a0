"""A run goes on from its checkpoint as if nothing had happened, whatever ended it; with real processes throughout."""

import json
import shutil
import signal
import subprocess

import pytest
from whole_runs import steps

from areal_jax.metrics.trained import read_trained
from tools import judge, soak

SYNCHRONOUS = {
    "controller.max_staleness": 0, "controller.batch_size": 8, "trainer.learning_rate": 1e-3,
    "trainer.checkpoint_every": 1, "trainer.keep_checkpoints": 9, "rollout.slots": 16,
}  # fmt: skip
STEPS = 4


def make_run(workdir, cache, **changes):
    workdir.parent.mkdir(parents=True, exist_ok=True)
    settings = {"launch.compile_cache": cache, **changes}
    return soak.Run(workdir, [f"--config.{key}={value}" for key, value in settings.items()])


def finish(run, number):
    """Runs to the end of step `number`."""
    run.begin(number)
    assert run.launcher.wait(600) == 0, run.log()
    assert run.left(5.0) == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four launches, on a machine that may be busy
def test_from_the_checkpoint_of_every_step_a_synchronous_run_goes_on_bit_for_bit(tmp_path, cache):
    whole = make_run(tmp_path / "whole", cache, **SYNCHRONOUS)
    finish(whole, STEPS)
    expected, weights = steps(whole.workdir), (whole.workdir / "export/model.safetensors").read_bytes()
    samples = read_trained(whole.workdir)
    assert len(expected) == STEPS and any(row["reward/std"] > 0 for row in expected)
    for version in range(1, STEPS):
        resumed = make_run(tmp_path / f"from_{version}", cache, **SYNCHRONOUS)
        shutil.copytree(whole.workdir / f"checkpoints/{version}", resumed.workdir / f"checkpoints/{version}")
        shutil.copy(whole.workdir / "config.json", resumed.workdir)
        finish(resumed, STEPS)
        assert read_trained(resumed.workdir) == {step: samples[step] for step in range(version, STEPS)}
        for ours, theirs in zip(steps(resumed.workdir), expected[version:], strict=True):
            for name in ("actor/loss", "actor/grad_norm", "actor/update_norm", "reward/mean", "actor/entropy"):
                assert ours[name] == theirs[name], (version, name)
        assert (resumed.workdir / "export/model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.faults
def test_an_asynchronous_run_loses_and_repeats_nothing_when_all_of_it_is_killed_or_told_to_end(tmp_path, cache):
    """Killed as a whole; then ended by SIGTERM to every process at once; then finished with fewer rollout workers."""
    run = make_run(tmp_path / "run", cache, **{"trainer.checkpoint_every": 2, "data.train": "arithmetic:count=96"})

    def until_trained(version):
        while max(read_trained(run.workdir), default=-1) < version:
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end
                run.launcher.wait(0.2)

    def signal_all(number):
        for process in run.processes():
            process.send_signal(number)
        run.launcher.wait(60)
        assert run.left(60.0, files=number != signal.SIGKILL) == []  # else the guardian is dead, too

    try:
        run.begin()
        until_trained(5)
        signal_all(signal.SIGKILL)
        killed_at, saved = max(read_trained(run.workdir)), judge.newest_state(run.workdir).version
        assert 0 < saved <= killed_at + 1
        run.begin()
        until_trained(killed_at + 3)
        signal_all(signal.SIGTERM)
        trained = max(read_trained(run.workdir)) + 1
        assert judge.newest_state(run.workdir).version == trained, "SIGTERM did not save: " + run.log()
        run.overrides.append("--config.rollout.workers=1")
        finish(run, trained + 6)
    finally:
        run.kill()
    trained_on, state = read_trained(run.workdir), judge.newest_state(run.workdir)
    assert len(state.ledger.epochs_done) >= 1
    bound, size = soak.SETTINGS["controller.max_staleness"], soak.SETTINGS["controller.group_size"]
    assert judge.ledger_problems(trained_on, state, steps=trained + 6, bound=bound, group_size=size) == []
    summary = json.loads((run.workdir / "summary.json").read_text())
    assert summary["trained_samples"] == (trained + 6) * 16 * size and summary["max_staleness"] <= bound
