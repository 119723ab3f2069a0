"""One launcher at a time holds a run's folder, and a killed one holds it until nothing of its run is left."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from areal_jax.config import ConfigError
from areal_jax.launch import session
from areal_jax.launch.guardian import ENDING, RUNNING
from areal_jax.transport.endpoints import read_endpoint, write_endpoint

ROOT = Path(__file__).parents[2]
LAUNCHER = f"""
    import os, pathlib, signal, sys
    sys.path.insert(0, {str(ROOT)!r})
    from areal_jax.launch import session
    from areal_jax.launch.supervisor import Role, Supervisor
    saves = '''if True:
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("up", flush=True)
        while not os.path.exists(sys.argv[1] + "/saved"):
            time.sleep(0.01)
    '''
    workdir = pathlib.Path(sys.argv[1])
    with session._lock(workdir, 0.0) as lock:
        trainer = Role(name="trainer", command=(sys.executable, "-c", saves, sys.argv[1]), env=dict(os.environ))
        Supervisor([trainer], ["trainer"], workdir, grace=60.0, lock=lock).start()
        print("up", flush=True)
        signal.pause()
"""


def hold(workdir, patience):
    with session._lock(workdir, patience):
        return True


@pytest.fixture
def launcher(tmp_path):
    """A launcher whose trainer is at work, and saves for as long as there is no file "saved"."""
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        log = tmp_path / "logs" / "trainer.log"
        while not log.exists() or not log.read_text():
            assert process.poll() is None
        yield process
    finally:
        (tmp_path / "saved").touch()
        process.kill()
        process.wait()


def test_a_run_that_is_running_is_refused_at_once(tmp_path, launcher, capsys):
    for _ in range(2):  # nor does the refused one change anything for the next
        with pytest.raises(ConfigError, match="is running already"):
            hold(tmp_path, 1e6)
    assert capsys.readouterr().err == ""


def test_the_next_start_waits_until_nothing_of_a_killed_launcher_is_left(tmp_path, launcher, monkeypatch, capsys):
    children = psutil.Process(launcher.pid).children(recursive=True)  # the guardian and the trainer
    launcher.kill()
    launcher.wait()
    while (tmp_path / "launch.lock").read_text() != ENDING:
        assert all(child.is_running() for child in children)
    write_endpoint(tmp_path, "controller", "tcp://127.0.0.1:1")  # which the guardian is still to remove
    for _ in range(2):
        with pytest.raises(ConfigError, match="still ending"):
            hold(tmp_path, -1.0)
    assert all(child.is_running() for child in children)
    waits, sleep = [], time.sleep

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "saved").touch()
        sleep(seconds)

    capsys.readouterr()
    monkeypatch.setattr(session.time, "sleep", wait)
    assert hold(tmp_path, 60.0) and len(waits) >= 2
    assert read_endpoint(tmp_path, "controller") is None
    assert capsys.readouterr().err.count("areal_jax: waiting for what a killed launcher has left") == 1
    assert hold(tmp_path, 0.0) and (tmp_path / "launch.lock").read_text() == RUNNING


@pytest.mark.parametrize(("number", "held"), [(errno.ENOSYS, True), (errno.EWOULDBLOCK, False)])
def test_a_file_system_without_locks_is_no_other_launcher(tmp_path, monkeypatch, number, held):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(session.fcntl, "flock", flock)
    (tmp_path / "launch.lock").write_text(RUNNING)
    with contextlib.nullcontext() if held else pytest.raises(ConfigError, match="is running already"):
        assert hold(tmp_path, 0.0)
