"""By its exit code a trainer says whether another start could change anything."""

import logging
import signal

import pytest

from areal_jax.disk import DiskFull, reserve
from areal_jax.exits import CANNOT_GO_ON
from areal_jax.models import ModelError
from areal_jax.trainer import __main__ as program
from areal_jax.trainer import loop
from areal_jax.trainer.batch import StalenessError
from areal_jax.trainer.checkpoint import CheckpointError
from areal_jax.trainer.guards import TrainingStopped
from areal_jax.trainer.link import WaitedTooLong
from areal_jax.transport.errors import RequestTimeout
from tests.trainer import fake


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake.prepare(tmp_path_factory.mktemp("exits"))[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingStopped, CANNOT_GO_ON), (WaitedTooLong, CANNOT_GO_ON), (StalenessError, CANNOT_GO_ON),
        (CheckpointError, CANNOT_GO_ON), (ModelError, CANNOT_GO_ON), (RequestTimeout, 1),
    ],
)  # fmt: skip
def test_what_a_trainer_has_decided_is_final_and_what_others_did_not_do_is_not(
    workdir, monkeypatch, capsys, error, code
):
    def run(_):
        raise error("the reason")

    monkeypatch.setattr(loop.Training, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    assert program.main(["--workdir", str(workdir), "--process", "0"]) == code
    assert capsys.readouterr().err == f"areal_jax.trainer: {error.__name__}: the reason\n"


@pytest.mark.parametrize("error", [DiskFull, CheckpointError])
def test_the_last_words_of_a_trainer_that_may_have_found_the_disk_full_get_the_room_kept_for_them(
    workdir, monkeypatch, error
):
    def run(_):
        raise error("the reason")

    monkeypatch.setattr(loop.Training, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    reserve(workdir)
    assert program.main(["--workdir", str(workdir), "--process", "0"]) == CANNOT_GO_ON
    assert not (workdir / "reserve").exists()
