"""A whole run on vLLM, whose rollout worker has an interpreter of its own; and one whose vLLM is killed half-way."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.vllm.processes import vllm_processes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.faults]
ROOT = Path(__file__).parents[2]
TOY = ROOT / "configs" / "toy"
STEPS = 6


@pytest.fixture
def run(tmp_path):
    """A run of a few steps on vLLM, as (its folder, its launcher)."""
    # An interpreter at another path, as that of another environment would be.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [
        *(sys.executable, "-m", "areal_jax.launch", f"--config={ROOT / 'configs' / 'quickstart.py'}"),
        *(f"--workdir={tmp_path / 'run'}", "--config.rollout.engine=vllm", f"--config.rollout.python={python}"),
        *(f"--config.trainer.steps={STEPS}", "--config.data.eval_limit=16", "--config.metrics.view=lines"),
        *("--config.controller.batch_size=4", "--config.controller.group_size=4", "--config.trainer.rows=8"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "output", "w") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            yield tmp_path / "run", launcher
        finally:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else ():
                process.kill()
            launcher.kill()
            launcher.wait(10)
            sys.stdout.write((tmp_path / "output").read_text())  # pytest shows it when the test has failed


def steps(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "actor/loss" in line]


def wait_for_step(folder: Path, launcher: subprocess.Popen, step: int, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in steps(folder)):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.skipif(not (TOY / "config.json").exists(), reason="the toy checkpoint is not there")
def test_a_run_whose_vllm_is_killed_goes_on_with_a_fresh_one(run):
    folder, launcher = run
    wait_for_step(folder, launcher, 1)
    killed = [p for p in vllm_processes(launcher.pid) if p.name().startswith("VLLM")]
    assert killed
    for process in killed:
        process.kill()
    assert launcher.wait(400) == 0
    lines = steps(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert any("mismatch/logprob_abs_diff_max" in line for line in lines)
    for line in lines:  # of lag 0: what vLLM said and what the trainer computes, before and after the kill
        assert line.get("mismatch/logprob_abs_diff_max", 0.0) < 1e-3
        assert line["staleness/max"] <= 4
    assert (folder.parent / "asked").read_text().count("areal_jax.rollout") >= 2
