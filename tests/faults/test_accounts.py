"""The judge of the soak and the fault injection can say no: each kind of wrong outcome is found.

The run's folder is made by hand. What a ledger can hold against a run is in tests/integration/test_soak.py.
"""

import fcntl
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from areal_jax.metrics.trained import TrainedGroup
from areal_jax.rewards import sandbox
from tools import judge
from tools.faults import launcher
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


def problems(workdir):
    data = {"epochs": launcher.EPOCHS, "prompts": PROMPTS, "quarantined": 0}
    return judge.summary_problems(workdir, bound=launcher.BOUND) + judge.data_problems(workdir, **data)


def test_a_right_outcome_has_no_problems(tmp_path):
    assert problems(write(tmp_path / "run", *right())) == []


def lost(steps, summary):
    del steps[3][0]


def gap(steps, summary):
    steps[9] = steps.pop(3)


def counted_less(steps, summary):
    summary["trained_samples"] -= 1


def counted_old(steps, summary):
    summary["max_staleness"] = launcher.BOUND + 1


def epoch_open(steps, summary):
    summary["epochs"] = []


def put_away(steps, summary):
    summary["quarantined"] = 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lost, "never trained on"), (gap, "not one after another"), (counted_less, "summary.json has"),
        (counted_old, "staleness of"), (epoch_open, "the ledger closed"), (put_away, "put away: 1"),
    ],
)  # fmt: skip
def test_a_wrong_account_is_found(tmp_path, spoil, said):
    steps, summary = right()
    spoil(steps, summary)
    assert any(said in problem for problem in problems(write(tmp_path / "run", steps, summary)))


def test_a_secret_in_a_log_and_an_open_folder_are_found(tmp_path):
    workdir = write(tmp_path / "run", *right())
    for folder, name, text in (("keys", "client.secret", "s3cr3t"), ("logs", "trainer-0.log", "key s3cr3t!")):
        (workdir / folder).mkdir()
        (workdir / folder / name).write_text(text)
    assert ["trainer-0.log" in problem for problem in judge.secrets(workdir)] == [True]
    workdir.chmod(0o755)
    assert any("open to others" in problem for problem in judge.secrets(workdir))


@pytest.fixture
def watched(tmp_path):
    run = Run(Fault(role="trainer", action="kill"), tmp_path / "x", seed=0)
    write(run.workdir, *right())
    (run.workdir / "launch.lock").touch()
    return run


def left(run):
    return " ".join(run.left_behind(0.0, finished=True))


def test_a_run_that_has_left_nothing_is_right(watched):
    assert left(watched) == ""


def test_a_process_that_is_left_is_found(watched):
    program = "import signal; print('up', flush=True); signal.pause()"
    stray = subprocess.Popen([sys.executable, "-c", program], env=watched.environment(), stdout=subprocess.PIPE)
    watched.launcher = stray
    stray.stdout.readline()
    assert "signal.pause()" in left(watched)
    stray.kill()
    stray.communicate()
    assert left(watched) == ""


SCRUBBED = """
import subprocess, sys
waits = "import signal; print('up', flush=True); signal.pause()"
process = subprocess.Popen([sys.executable, "-c", waits], env={}, cwd="/", start_new_session=True)
print(process.pid, flush=True)
"""
SANDBOXED = """
from areal_jax.rewards import sandbox
program = "import time; print('up'); time.sleep(60)"
sandbox.run_script(program, isolation="landlock", limits=sandbox.Limits(wall_seconds=60.0))
"""


def test_a_program_without_the_runs_environment_session_or_parent_is_found(watched, tmp_path):
    watched.launcher = watched.start([sys.executable, "-c", SCRUBBED], tmp_path / "log")
    assert watched.launcher.wait() == 0
    pid = int(next(word for word in (tmp_path / "log").read_text().split() if word.isdigit()))  # of two who write there
    try:
        assert f"process {pid} is left" in left(watched)
    finally:
        stray = psutil.Process(pid)
        stray.kill()
    deadline = time.monotonic() + 30
    while (found := left(watched)) and time.monotonic() < deadline:
        psutil.wait_procs([stray], timeout=0.05)  # whose parent may never ask for it
    assert found == ""


@pytest.mark.parametrize("infinity", [-1, 2**64 - 1])
def test_a_run_is_marked_where_message_queues_have_no_limit(tmp_path, monkeypatch, infinity):
    monkeypatch.setattr(judge.resource, "RLIM_INFINITY", infinity)
    monkeypatch.setattr(judge.resource, "getrlimit", lambda _: (infinity, infinity))
    assert 1 << 29 <= judge.Watched(tmp_path / "run", tmp_path / "tmp").limit < 1 << 30


@pytest.mark.skipif(bool(sandbox.works("landlock")), reason="no Landlock here")
def test_a_program_in_the_sandbox_is_found(watched, tmp_path):
    watched.launcher = watched.start([sys.executable, "-c", SANDBOXED], tmp_path / "log")

    def programs():
        return [p for p in watched.processes() if any("confine" in word for word in p.cmdline())]

    while not programs():
        assert watched.launcher.poll() is None
    assert f"process {programs()[0].pid} is left" in left(watched)
    watched.kill()
    watched.launcher.wait()


def test_the_lock_of_a_run_that_is_not_over_is_found(watched):
    with open(watched.workdir / "launch.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "the lock of" in left(watched)
    assert left(watched) == ""


@pytest.mark.parametrize("name", ["sem.test", "areal_jax-test", "vllm_dist-test"])
def test_whatever_is_new_in_shared_memory_and_nobodys_is_found(watched, name):
    path = judge.SHARED_MEMORY / f"{name}-{os.getpid()}"
    path.touch()
    try:
        assert path.name in left(watched)
        with open(path):
            assert left(watched) == ""  # somebody's who lives
    finally:
        path.unlink()
    assert left(watched) == ""


# Makes a named semaphore, as vLLM does, and dies with its cleaner.
SEMAPHORE = """
import multiprocessing, os, signal
from multiprocessing import resource_tracker
lock = multiprocessing.get_context("spawn").Lock()
print("sem." + lock._semlock.name[1:], flush=True)
input()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def semaphore():
    """Starts a process with a named semaphore: (the process, the semaphore's path). It dies when told anything."""
    made = []

    def make(**options):
        command, pipe = [sys.executable, "-c", SEMAPHORE], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, **options)
        made.append((process, judge.SHARED_MEMORY / process.stdout.readline().strip()))
        return made[-1]

    yield make
    for process, path in made:
        process.kill()
        process.communicate()
        path.unlink(missing_ok=True)


def test_a_semaphore_that_nobody_will_remove_is_found_and_no_living_ones(watched, semaphore):
    """Whatever cleaners of other programs there are: they remove theirs, and no others."""
    (_, others), (process, path) = semaphore(), semaphore()
    assert path.exists() and path.name not in left(watched)  # it is mapped
    process.communicate("die\n")
    assert path.name in left(watched) and others.name not in left(watched)


def test_what_a_program_beside_the_run_leaves_is_not_the_runs(watched, semaphore, tmp_path, monkeypatch):
    """Tests of vLLM run beside judged runs; an engine that is killed leaves a semaphore for its program to remove."""
    monkeypatch.setattr(judge, "LOOK_SECONDS", 0.01)
    watched.launcher = watched.start([sys.executable, "-c", "input()"], tmp_path / "log")
    watched.launcher.wait()
    (other, others), (ours, path) = semaphore(), semaphore(env=watched.environment())
    deadline = time.monotonic() + 30
    while not {others.name, path.name} <= set(watched.users):
        assert time.monotonic() < deadline
    for process in (other, ours):
        process.communicate("die\n")
    assert path.name in left(watched) and others.name not in left(watched)


def test_files_that_are_left_are_found(watched):
    (watched.temporary / "areal-jax-sandbox-1").mkdir()
    assert "areal-jax-sandbox-1" in left(watched)
    for name in ("endpoints/controller", "silent/rollout-0", "controller/ledger", "weights/v1"):
        (watched.workdir / name).parent.mkdir()
        (watched.workdir / name).touch()
        assert name.partition("/ledger")[0] in left(watched)


def test_a_launcher_ends_with_whoever_tries_the_faults(tmp_path):
    """The test runner is killed: what it has started is told to end."""
    program = f"""
import sys; sys.path.insert(0, {str(judge.ROOT)!r})
from pathlib import Path
from tools import judge
run = judge.Watched(Path({str(tmp_path)!r}) / "run", Path({str(tmp_path)!r}) / "tmp")
waits = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); " \
        "signal.pause()"
child = run.start([sys.executable, "-c", waits], Path({str(tmp_path)!r}) / "log")
while "up" not in Path({str(tmp_path)!r}, "log").read_text():
    assert child.poll() is None
print(child.pid, flush=True)
sys.stdin.read()
"""
    runner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    launcher_of_it = psutil.Process(int(runner.stdout.readline()))
    runner.kill()
    runner.communicate()
    psutil.wait_procs([launcher_of_it], timeout=30)
    assert not launcher_of_it.is_running() or launcher_of_it.status() == psutil.STATUS_ZOMBIE


def test_a_right_run_is_not_said_to_have_been_started_again(watched):
    assert watched.started_again() == {}
    rows = [{"role": "rollout-0"}, {"role": "trainer-0"}, {"role": "rollout-0"}]
    (watched.workdir / "restarts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert watched.started_again() == {"rollout-0": 2, "trainer-0": 1}
