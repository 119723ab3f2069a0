"""Several JAX processes are one trainer: the same batches give the same weights as a single process."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from areal_jax import config as configs
from areal_jax.config import ConfigError
from areal_jax.exits import CANNOT_GO_ON
from areal_jax.launch import child
from areal_jax.metrics.writers import read_metrics
from areal_jax.trainer import distributed
from areal_jax.transport import messages as m
from tests.trainer import fake

ROOT = Path(__file__).parents[2]


# What a launcher's own job step leaves in the environment: none of it is about the trainer's processes.
SLURM = {"JOB_ID": "1", "STEP_NODELIST": "nowhere[1-2]", "NTASKS": "2", "PROCID": "1", "LOCALID": "1"}


def start(workdir, process):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    env |= {f"SLURM_{name}": value for name, value in SLURM.items()}
    command = [sys.executable, "-S", child.__file__, str(os.getpid()), "0"]  # ends when the tests do
    command += [sys.executable, "-m", "areal_jax.trainer", "--workdir", str(workdir), "--process", str(process)]
    log = open(workdir / f"trainer-{process}.log", "w")  # noqa: SIM115
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=workdir)


def run(folder, processes, **trainer):
    """Trains with real processes against the scripted controller; the exported weights, the controller, and the
    addresses that the trainer listened on."""
    workdir, _ = fake.prepare(folder, processes=processes, **trainer)
    listening, started = set(), []

    def look(version):
        connections = [each for process in started for each in psutil.Process(process.pid).net_connections()]
        open_ones = (each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN)
        listening.update(ip.removeprefix("::ffff:") for ip in open_ones)

    with fake.FakeController(workdir) as controller:
        controller.on_batch = look
        started = [start(workdir, i) for i in range(processes)]
        try:
            codes = [process.wait(240) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    logs = "\n".join((workdir / f"trainer-{i}.log").read_text()[-3000:] for i in range(processes))
    assert codes == [0] * processes, logs
    return load_file(workdir / "export" / "model.safetensors"), controller, listening


def test_a_host_that_cannot_be_found_by_its_name_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid.*/etc/hosts"):
        distributed.start(tmp_path, 0, 2, "tcp://0.0.0.0:*")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data_parallel", "fsdp"])
def test_two_processes_equal_one(tmp_path, axis):
    settings = {"proximal": "recompute", "minibatches": 2, "steps": 2, "fsdp": 1}
    alone, _, none = run(tmp_path / "one", 1, **settings)
    both, controller, listening = run(tmp_path / "two", 2, **(settings | {axis: 2}))
    assert sorted(controller.versions) == [0, 1, 2]
    assert len({beat.name for beat in controller.beats}) == 2
    assert not none and "127.0.0.1" in listening
    gloos = socket.gethostbyname(socket.gethostname())  # it takes the address of the host's name; there is no setting
    assert listening <= {"127.0.0.1", gloos}, "JAX's traffic knows no keys"
    for name, value in alone.items():
        assert np.abs(value - controller.versions[0][name]).max() > 0 or "bias" in name
        np.testing.assert_allclose(both[name], value, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_and_a_single_one_goes_on(tmp_path):
    workdir, _ = fake.prepare(tmp_path, steps=3, processes=2, fsdp=2)
    trainers = []

    def interrupt(version):
        if version == 1 and not any(process.poll() is not None for process in trainers):
            trainers[1].send_signal(signal.SIGTERM)

    def ended(count):
        return [process.wait(120) for process in trainers[-count:]]

    with fake.FakeController(workdir) as controller:
        controller.on_batch = interrupt
        trainers += [start(workdir, i) for i in range(2)]
        try:
            assert ended(2) == [75, 75], (workdir / "trainer-0.log").read_text()[-3000:]
            assert "Finish" not in controller.kinds()
            controller.on_batch = lambda version: None
            controller.log.clear()
            config = configs.load(workdir)
            config["trainer"].update(processes=1, fsdp=1)
            configs.save(config, workdir)
            trainers.append(start(workdir, 0))
            assert ended(1) == [0], (workdir / "trainer-0.log").read_text()[-3000:]
        finally:
            for process in trainers:
                process.kill()
    assert controller.kinds()[0] == "SetState"
    assert controller.state.version in (1, 2)
    assert next(x.version for x in controller.log if isinstance(x, m.GetBatch)) == controller.state.version


def room_for_files(trainer, size):
    """No file of this process may grow beyond `size` bytes any more: what a full disk or a quota does to large ones."""
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_but_neither_the_run_nor_the_last_whole_one(tmp_path):
    trainer = {"steps": 6, "checkpoint_every": 1, "publish_dtype": "bfloat16"}
    workdir, _ = fake.prepare(tmp_path, width=128, controller={"disk_limit": 1.0}, **trainer)
    log = workdir / "trainer-0.log"
    trainer, full = None, {2, 3, 5}

    def limit(version):
        weights = next(message.manifest.nbytes for message in controller.log if isinstance(message, m.Publish))
        room_for_files(trainer, int(1.4 * weights) if version in full else resource.RLIM_INFINITY)  # checkpoints: x 2

    with fake.FakeController(workdir) as controller:
        controller.on_batch = limit
        trainer = start(workdir, 0)
        try:
            assert trainer.wait(240) == CANNOT_GO_ON, log.read_text()[-3000:]  # the last one had to be written
            text = log.read_text()
            assert "the checkpoint of version 3 could not be written" in text and "going on, the newest" in text
            last = text.strip().splitlines()[-1]
            assert last.startswith("areal_jax.trainer: DiskFull: the checkpoint of version 6 could not be")
            assert "(controller.disk_limit)" in last
            assert not list((workdir / "checkpoints").glob("*tmp*"))
            failed = [row["checkpoint/failed"] for row in read_metrics(workdir)[1:]]
            assert failed == sorted(failed) and failed[0] == 0 and failed[-1] >= 1
            whole = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            assert whole in (4, 5)  # that of 5 was begun before there was no room
            controller.log.clear()
            full.clear()
            trainer = start(workdir, 0)
            assert trainer.wait(240) == 0, log.read_text()[-3000:]
        finally:
            trainer.kill()
    assert controller.state.version == whole and controller.state.data == b"state of %d" % whole
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5, 6]


@pytest.mark.slow
def test_what_ends_a_trainer_is_one_line(tmp_path):
    workdir, _ = fake.prepare(tmp_path, steps=3)
    controller = fake.FakeController(workdir)
    controller._answer = lambda message: (
        m.Refused(reason="no sample finished for 600 s") if isinstance(message, m.Publish) else None
    )
    with controller:
        trainer = start(workdir, 0)
        try:
            assert trainer.wait(120) == 1
        finally:
            trainer.kill()
    last = (workdir / "trainer-0.log").read_text().strip().splitlines()[-1]
    assert last.startswith("areal_jax.trainer: RequestRefused: ") and "no sample finished for 600 s" in last
