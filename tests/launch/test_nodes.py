"""A run on several nodes: what is where, and launch/slurm.sh with programs in the place of Slurm's."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from areal_jax import config as configs
from areal_jax.config import ConfigError
from areal_jax.launch import __main__ as program
from areal_jax.launch import session
from areal_jax.launch.nodes import Share, check_nodes, share_of
from areal_jax.launch.roles import roles_of
from areal_jax.launch.supervisor import Role
from configs import quickstart

ROOT = Path(__file__).parents[2]


def settings(**changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict({"controller.address": "tcp://0.0.0.0:*", "rewards.address": "tcp://0.0.0.0:*"})
    config.update_from_flattened_dict({"trainer.weights_transport": "tcp"} | changes)
    return configs.resolve(config)


def test_some_nodes_train_and_the_others_generate():
    config = settings(**{"trainer.processes": 4, "rollout.workers": 8, "launch.trainer_nodes": 2})
    config["rewards"]["services"] = 2
    assert [share_of(config, node, 5) for node in range(5)] == [
        Share(True, range(1), range(2), range(0)),
        Share(False, range(1, 1), range(2, 4), range(0)),
        Share(False, range(1, 2), range(0), range(3)),
        Share(False, range(2, 2), range(0), range(3, 6)),
        Share(False, range(2, 2), range(0), range(6, 8)),
    ]
    config["launch"]["trainer_nodes"] = 0
    assert share_of(config, 1, 2) == Share(False, range(1, 2), range(2, 4), range(4, 8))


def test_the_example_of_the_page_is_for_five_nodes():
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    config = quickstart.get_config()
    exec(page.split("```python\n")[1].split("```")[0], {"c": config})
    config.controller.address = config.rewards.address = "tcp://0.0.0.0:*"
    check_nodes(configs.resolve(config), 5)
    assert [len(share_of(config, node, 5).workers) for node in range(5)] == [0, 0, 4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "nodes", "message"),
    [
        ({"launch.trainer_nodes": 2}, 2, "leaves none of 2 node"),
        ({"launch.trainer_nodes": 1, "trainer.processes": 3}, 1, r"launch/slurm\.sh.*trainer_nodes=0"),
        ({"trainer.processes": 3, "launch.trainer_nodes": 2}, 4, r"3 cannot be shared out evenly among 2 nodes"),
        ({"launch.trainer_nodes": 1}, 4, r"workers=1 is fewer than the 3 nodes that generate"),
        ({"launch.trainer_nodes": 1, "trainer.weights_transport": "shm"}, 2, r"'shm' reaches one host.*'tcp'.*'disk'"),
        ({"launch.trainer_nodes": 1, "rewards.address": "tcp://localhost:*"}, 2, r"rewards\.address.*tcp://0\.0\.0\.0"),
    ],
)
def test_a_run_that_cannot_be_shared_out_is_refused_before_it_starts(changes, nodes, message):
    with pytest.raises(ConfigError, match=message):
        check_nodes(settings(**changes), nodes)


def test_each_node_shares_out_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    asked = {"trainer.processes": 2, "rollout.workers": 4, "launch.trainer_nodes": 1, "launch.rollout_gpus": 1}
    config = settings(**asked, **{"launch.trainer_env": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}})
    found = {}
    for node in range(3):
        roles, leaders = roles_of(config, tmp_path, share_of(config, node, 3))
        found |= {role.name: role.env.get("CUDA_VISIBLE_DEVICES") for role in roles if role.name[:2] in ("tr", "ro")}
        assert leaders == ([] if node else ["trainer-0", "trainer-1"])
        assert all(role.env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9" for role in roles if role.name in leaders)
    assert [found[f"trainer-{i}"] for i in range(2)] == ["0,1", "2,3"]
    assert [found[f"rollout-{i}"] for i in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"; 0 are visible.*--gpus-per-node"):
        roles_of(config, tmp_path, share_of(config, 1, 3))


def test_a_node_that_only_generates_leaves_the_runs_folder_to_the_first(tmp_path, monkeypatch, capsys):
    """Its guardian must not remove weights and addresses of a run that goes on elsewhere."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "endpoints").mkdir()
    (tmp_path / "endpoints" / "controller").touch()
    configs.save(settings(**{"rollout.workers": 2, "launch.trainer_nodes": 1}), tmp_path)
    fails_once = "import os, sys; os.path.exists('seen') or sys.exit(open('seen', 'w').close() or 1)"
    ends = [Role(name=f"rollout-{i}", command=(sys.executable, "-c", code), env=dict(os.environ), restarts=1)
            for i, code in enumerate(("", fails_once))]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "roles_of", lambda config, workdir, share: (ends, []))
    assert session.run_node(tmp_path, 1, 2) == 0
    assert (
        "node 1" in (said := capsys.readouterr().err) and "rollout-1 ended with exit code 1; starting it again" in said
    )
    assert (tmp_path / "restarts-node1.jsonl").exists() and not (tmp_path / "restarts.jsonl").exists()
    assert (tmp_path / "weights").is_dir() and (tmp_path / "endpoints" / "controller").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node=1", "--nodes=2", "--workdir=nowhere"], "nowhere/config.json does not exist"),
        (["--node=1", "--nodes=2", "--workdir=nowhere", "--config.seed=2"], "given with --prepare"),
        (["--node=x", "--workdir=nowhere"], "--node=x: nodes are counted from 1"),
        (["--node=0", "--workdir=nowhere"], "needs --nodes"),
        (["--node=0", "--nodes=2", "--dry_run"], "leave --dry_run and --prepare out"),
        (["--nodes=2", "--config=c.py", "--workdir=nowhere"], "give --prepare, --dry_run or"),
    ],
)
def test_a_node_starts_a_part_of_a_prepared_run(arguments, message, capsys):
    assert program.main(arguments) == 2
    assert message in capsys.readouterr().err


# Programs in the place of Slurm's: each task of a step is a process here, and a signal to srun kills its tasks.
SRUN = """#!/usr/bin/env bash
while [[ $1 = --* ]]; do [[ $1 = --ntasks=* ]] && count=${1#*=}; shift; done
for ((i = 0; i < count; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); echo $! >> tasks; done
trap 'kill -KILL "${pids[@]}"' TERM
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$*" > cancelled; kill "${1/#--signal=/-}" $(< tasks); exit 0
"""
# The launcher: prepares, or stays until it is told to stop. That of a node named in `ends` ends by itself, with code 1.
PYTHON = """#!/usr/bin/env bash
node=${*: -1}
trap 'echo "$node" >> saved; exit 130' TERM
echo "$*" >> launched
[[ $* = *--prepare* ]] && exit 0
[[ -n "${ENDS:-}" && $node != --node=0 ]] && exit 1
while :; do /bin/sleep 0.05 & wait $!; done
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm.sh in a folder with those programs, for three nodes."""
    programs = {
        "srun": SRUN,
        "scancel": SCANCEL,
        "sleep": "#!/bin/sh\nexec /bin/sleep 0.002\n",
        "env/bin/python": PYTHON,
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "VENV": "env"}
    own["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", ROOT / "launch/slurm.sh", "c.py", "run", "--config.seed=3"]
    started = []

    def start(**more):
        options = {"stderr": subprocess.PIPE, "text": True, "process_group": 0}
        started.append(subprocess.Popen(command, env={**os.environ, **own, **more}, **options))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a test that failed has left as well
        process.wait()


def lines(path, count):
    deadline = time.monotonic() + 30
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{path.name} has fewer than {count} lines"
        time.sleep(0.01)
    return path.read_text().splitlines()


def test_slurm_starts_one_launcher_per_node_and_a_signal_lets_them_save(slurm, tmp_path):
    job = slurm()
    prepare, *launchers = lines(tmp_path / "launched", 4)
    assert prepare.startswith("-m areal_jax.launch --prepare --nodes=3 --config=c.py --workdir=run ")
    assert prepare.endswith(" --config.rewards.address=tcp://0.0.0.0:* --config.launch.stop_grace=540 --config.seed=3")
    assert sorted(launchers) == [f"-m areal_jax.launch --workdir=run --nodes=3 --node={node}" for node in range(3)]
    lines(tmp_path / "tasks", 3)
    job.send_signal(signal.SIGTERM)  # as scancel --batch
    assert job.wait(30) == 130
    assert sorted(lines(tmp_path / "saved", 3)) == ["--node=0", "--node=1", "--node=2"]
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"


def test_a_run_whose_other_nodes_have_all_failed_is_stopped(slurm, tmp_path):
    job = slurm(ENDS="1")
    assert job.wait(60) == 130 and "the launchers of all other nodes have ended" in job.stderr.read()
    assert lines(tmp_path / "saved", 1) == ["--node=0"]
