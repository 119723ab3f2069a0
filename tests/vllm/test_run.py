"""A whole run on two vLLM workers, in which one's vLLM is killed.

Rollout processes find no jax, all others no torch and no vLLM, as in virtual environments of their own.
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from areal_jax.metrics.clock import trace_path
from areal_jax.transport.messages import GetStatus
from areal_jax.transport.sockets import SyncClient
from tests.vllm.processes import vllm_processes

ROOT = Path(__file__).parents[2]
TOY = ROOT / "configs" / "toy"
JAX, TORCH = ("jax", "jaxlib", "flax", "optax", "orbax", "chex"), ("torch", "vllm")
# Python runs this when it starts: some packages are not there.
ABSENT = """
from importlib.machinery import PathFinder

_find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: (
        None if name.partition(".")[0] in {absent!r} else _find(name, path, target)
    )
)
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(not (TOY / "config.json").exists(), reason="the toy checkpoint is not there"),
]


@dataclasses.dataclass
class Run:
    """What was seen of the run, and its folder."""

    folder: Path
    launcher: subprocess.Popen
    libraries: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # of both sides, by package
    goodbye: str = ""  # what the controller noted about the worker whose vLLM was killed
    left_at: int = -1  # the trainer's version then
    rejoined: dict[str, Any] = dataclasses.field(default_factory=dict)  # status, once the fresh worker had weights
    orphans: list[psutil.Process] | None = None  # what a killed worker's vLLM left
    exit_code: int = -1

    def status(self) -> dict[str, Any]:
        with SyncClient("observer", self.folder) as client:
            return dict(client.request(GetStatus(), timeout=30.0).data)

    def wait(self, until: Callable[[], Any], seconds: float = 300.0) -> Any:
        """What `until` returns, as soon as that is true."""
        deadline = time.monotonic() + seconds
        while not (found := until()):
            assert self.launcher.poll() is None, "the run has ended"
            assert time.monotonic() < deadline, "this did not happen in time"
            time.sleep(0.2)
        return found

    def steps(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if "actor/loss" in line]

    def spans(self, worker: str, phase: str) -> list[tuple[float, float]]:
        """When `worker` was in `phase`: (start, end), in seconds since the epoch."""
        path = Path(trace_path(self.folder, worker))  # begins with the end of the first phase
        lines = path.read_text().splitlines() if path.exists() else []
        return [(s["start"], s["end"]) for s in map(json.loads, lines) if s["phase"] == phase]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for side, absent in (("rollout", JAX), ("others", TORCH)):
        (folder / side).mkdir()
        (folder / side / "sitecustomize.py").write_text(ABSENT.format(absent=absent))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "rollout"}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [
        *(sys.executable, "-m", "areal_jax.launch", f"--config={ROOT / 'configs' / 'quickstart.py'}"),
        *(f"--workdir={folder / 'run'}", "--config.rollout.engine=vllm", f"--config.rollout.python={python}"),
        *("--config.rollout.workers=2", "--config.rollout.slots=16", "--config.trainer.steps=100000"),
        *("--config.trainer.eval_every=0", "--config.data.eval_limit=16", "--config.metrics.view=lines"),
        *("--config.controller.batch_size=4", "--config.controller.group_size=4", "--config.trainer.rows=8"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'others'}:{ROOT}"}
    with open(folder / "output", "w") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    run = Run(folder / "run", launcher)
    try:
        watch(run)
        yield run
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else ():
            process.kill()
        launcher.kill()
        launcher.wait(10)
        sys.stdout.write((folder / "output").read_text())  # pytest shows it when the test has failed


def watch(run: Run) -> None:
    """Let both workers have updates, kill the vLLM of one, see what follows, and stop the run."""
    run.wait(lambda: run.steps() and all(len(run.spans(w, "loading_weights")) > 3 for w in ("rollout-0", "rollout-1")))
    before = run.status()
    for side, name in (("trainer", "trainer-0"), ("rollout", "rollout-0")):
        process = psutil.Process(before["roles"][name]["pid"])
        maps = [m.path for p in (process, *process.children(recursive=True)) for m in p.memory_maps()]
        found = {package: [path for path in maps if f"/{package}/" in path] for package in (*JAX, *TORCH)}
        run.libraries[side] = {package: paths[0] for package, paths in found.items() if paths}
    engine, *_ = vllm_processes(before["roles"]["rollout-0"]["pid"])
    engine.suspend()  # so that it has samples when it is killed
    run.wait(lambda: run.status()["roles"]["rollout-0"]["running"])
    engine.kill()
    notes = run.wait(lambda: [note for note in run.status()["notes"] if "rollout-0 said goodbye" in note], 60)
    run.goodbye = notes[-1]
    run.left_at = run.status()["version"]
    run.wait(lambda: run.status()["version"] > run.left_at + 8)  # more than can have been on their way
    run.rejoined = run.wait(
        lambda: (s := run.status()) and s["roles"].get("rollout-0", {}).get("version", -1) >= 0 and s
    )
    worker = psutil.Process(run.rejoined["roles"]["rollout-1"]["pid"])
    engines = vllm_processes(worker.pid)
    worker.kill()
    _, run.orphans = psutil.wait_procs(engines, timeout=30)
    run.launcher.send_signal(signal.SIGTERM)
    run.exit_code = run.launcher.wait(120)


def test_rollouts_run_without_jax_and_the_trainer_without_torch_and_vllm(run):
    rollout, trainer = run.libraries["rollout"], run.libraries["trainer"]
    assert rollout.keys() >= {"torch", "vllm"} and not rollout.keys() & set(JAX), rollout
    assert "jaxlib" in trainer and not trainer.keys() & set(TORCH), trainer


def test_workers_load_one_after_another_so_that_the_fleet_never_stands_still(run):
    first, second = (run.spans(worker, "loading_weights") for worker in ("rollout-0", "rollout-1"))
    both = [(a, b) for a, b in itertools.product(first, second) if max(a[0], b[0]) < min(a[1], b[1])]
    assert len(first) > 3 and len(second) > 3 and not both


def test_a_killed_vllm_is_reported_and_its_samples_go_to_others(run):
    assert "vLLM's engine process ended" in run.goodbye and "with 0 samples" not in run.goodbye, run.goodbye
    assert run.rejoined["workers_died"] == 1 and run.rejoined["quarantined"] == 0
    assert run.rejoined["failed"].keys() <= {"weights_refused"}  # no sample; a version may be gone before it is read
    assert run.rejoined["version"] > run.left_at + 8  # and training went on


def test_a_fresh_worker_joins_with_the_newest_version(run):
    assert run.rejoined["roles"]["rollout-0"]["version"] >= run.left_at
    assert run.exit_code == 130  # stopped by a signal, in order


def test_a_killed_worker_takes_its_vllm_with_it(run):
    assert run.orphans == []


def test_every_step_is_fresh_enough_and_engine_and_trainer_agree_at_lag_0(run):
    lines = run.steps()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert max(line["staleness/max"] for line in lines) <= 4
    mismatches = [line["mismatch/logprob_abs_diff_max"] for line in lines if "mismatch/logprob_abs_diff_max" in line]
    assert mismatches and max(mismatches) < 1e-3  # before and after the kill
    stale = next(line for line in lines if "mismatch_stale/ess" in line)
    parts = ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl", "k3_kl", "ppl_ratio", "ess")
    assert all(f"mismatch_stale/{part}" in stale for part in parts)


def test_every_part_of_an_update_is_in_the_metrics(run):
    last = run.steps()[-1]
    assert last.keys() >= {"weights/gather", "weights/convert", "weights/copy"}
    assert last.keys() >= {f"update/{part}" for part in ("read", "verify", "open", "load", "pause", "latency")}
    assert 0 < last["update/load"] < last["update/pause"] < last["update/latency"]
