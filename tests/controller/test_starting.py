"""A controller that takes long before it listens says so: its launcher waits for it (`launch.announce_limit`)."""

import errno
import sys

import pytest

from areal_jax import config as configuration
from areal_jax import disk
from areal_jax.config import default_config, resolve
from areal_jax.controller import __main__ as program
from areal_jax.data.readers import DataError
from areal_jax.exits import WRONG_SETTING
from areal_jax.transport.endpoints import starting_mark


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The program with the default settings; `started()` is its exit code."""
    monkeypatch.setattr(sys, "argv", ["controller", "--workdir", str(tmp_path)])
    monkeypatch.setattr(configuration, "load", lambda workdir: resolve(default_config()))
    monkeypatch.setattr(disk, "RETRY_SECONDS", 0.0)
    return program.main


def test_a_controller_that_waits_for_the_disk_gives_a_sign(tmp_path, monkeypatch, started):
    marks = []

    def incarnation(workdir):
        marks.append(starting_mark(workdir, "controller"))
        if len(marks) < 3:
            raise OSError(errno.ENOSPC, "No space left on device", "controller.incarnation")
        raise DataError("enough")

    monkeypatch.setattr(program, "next_incarnation", incarnation)
    assert started() == WRONG_SETTING
    assert marks[0] is None and marks[1] is not None


def test_a_controller_that_reads_its_data_gives_a_sign(tmp_path, monkeypatch, started):
    marks = []

    def load(spec, data, check=None):
        marks.append(starting_mark(tmp_path, "controller"))
        raise DataError("enough")

    monkeypatch.setattr("areal_jax.data.prompts.load_dataset", load)
    assert started() == WRONG_SETTING
    assert marks[0] is not None
