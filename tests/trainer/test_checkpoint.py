"""A checkpoint gives back every bit, on any mesh, and says what is wrong when it cannot."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from areal_jax import models
from areal_jax.trainer import state
from areal_jax.trainer.checkpoint import CheckpointError, Checkpoints, read_memory
from tests.models import tiny
from tests.trainer import toy

ROOT = Path(__file__).parents[2]


def make_state(mesh, optimizer, version=3, seed=0, **options):
    model = toy.make_model(mesh=mesh, **options)
    made = state.create(tiny.random_params(model, seed), optimizer, mesh, version)
    # Moments that are not zero, in every leaf.
    numbered = [
        jax.device_put(x + np.asarray(i + 1, x.dtype), x.sharding)
        for i, x in enumerate(jax.tree.leaves(made.opt_state))
    ]
    return dataclasses.replace(made, opt_state=jax.tree.unflatten(jax.tree.structure(made.opt_state), numbered))


@pytest.fixture(scope="module")
def optimizer():
    return state.make_optimizer(toy.settings())


def test_a_checkpoint_restores_every_bit_on_another_mesh(tmp_path, optimizer):
    one = models.make_mesh(jax.devices()[:1])
    saved = make_state(one, optimizer)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.save(saved, b"\x00controller\xff", {"accuracy_before": 0.25, "config": {"a": [1]}})
    checkpoints.close()

    mesh = models.make_mesh(jax.devices()[:8], data=2, fsdp=2, tensor=2)
    model = toy.make_model(mesh=mesh)
    like = state.abstract(model.abstract_params(), optimizer, mesh)
    again = Checkpoints(tmp_path / "checkpoints")
    restored = again.restore(like)
    assert again.latest() == int(restored.state.version) == 3
    assert restored.controller == b"\x00controller\xff"
    assert restored.memory == {"accuracy_before": 0.25, "config": {"a": [1]}}
    for (path, want), got, place in zip(
        jax.tree_util.tree_leaves_with_path(saved), jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(want), np.asarray(got), err_msg=str(path))
        assert got.sharding.is_equivalent_to(place.sharding, got.ndim)
    again.close()
    assert read_memory(tmp_path / "checkpoints")["accuracy_before"] == 0.25


def test_the_saved_values_are_those_of_the_moment_of_saving(tmp_path, optimizer):
    """Saving goes on in the background while the next step overwrites (donates) the very same buffers."""
    mesh = models.make_mesh(jax.devices()[:1])
    saved = make_state(mesh, optimizer)
    expected = [np.array(x) for x in jax.tree.leaves(saved)]
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(saved, b"", {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    jax.block_until_ready(overwrite(saved))
    checkpoints.wait()
    restored = checkpoints.restore(like)
    assert restored.controller == b""
    for want, got in zip(expected, jax.tree.leaves(restored.state), strict=True):
        np.testing.assert_array_equal(want, np.asarray(got))
    checkpoints.close()


def test_the_newest_are_kept_and_wrong_ones_are_named(tmp_path, optimizer):
    mesh = models.make_mesh(jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoints.restore(make_state(mesh, optimizer))
    saved = make_state(mesh, optimizer)
    for version in (1, 2, 3):
        at = dataclasses.replace(saved, version=jax.device_put(np.int32(version), saved.version.sharding))
        assert checkpoints.save(at, b"", {}, wait=True)
    assert not checkpoints.save(saved, b"", {})  # version 3 is there
    assert sorted(checkpoints._manager.all_steps()) == [2, 3]
    with pytest.raises(CheckpointError, match=r"of another model: .*expected float32\[40, 64\]"):
        checkpoints.restore(make_state(mesh, optimizer, width=64))
    checkpoints.close()


def test_a_last_save_that_succeeds_is_not_blamed_for_the_one_before(tmp_path, optimizer, monkeypatch):
    """The background writer meets a full disk once."""
    made = make_state(models.make_mesh(jax.devices()[:1]), optimizer)
    checkpoints = Checkpoints(tmp_path)
    wait_until_finished = ocp.CheckpointManager.wait_until_finished

    def no_room(manager):
        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait_until_finished)
        manager.wait_until_finished()
        raise OSError("no space left")

    checkpoints.save(at_version(made, 1), b"", {})
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", no_room)
    assert checkpoints.save(at_version(made, 2), b"", {}, wait=True)
    assert checkpoints.latest() == 2
    (failure,) = checkpoints.failed
    assert failure.startswith("the checkpoint of version 1 could not be written") and "no space left" in failure

    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: no_room(checkpoints._manager))
    with pytest.raises(CheckpointError, match=r"^the checkpoint of version 3 .* no space left$"):
        checkpoints.save(at_version(made, 3), b"", {}, wait=True)
    checkpoints.close()


def test_of_several_processes_one_that_cannot_write_raises_and_its_end_says_the_same(tmp_path, optimizer, monkeypatch):
    """Orbax raises what went wrong again, in other words, when it is closed."""
    made = make_state(models.make_mesh(jax.devices()[:1]), optimizer)
    checkpoints = Checkpoints(tmp_path)

    def no_room(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left")

    for method in ("save", "close"):
        monkeypatch.setattr(ocp.CheckpointManager, method, no_room)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=r"^the checkpoint of version 3 could not be written"):
        try:
            checkpoints.save(at_version(made, 3), b"", {})
        finally:
            checkpoints.close()


KILLED = """
import os, signal, sys
import numpy as np
from areal_jax import models
from areal_jax.trainer import state
from areal_jax.trainer.checkpoint import Checkpoints
from tests.trainer import toy
from tests.trainer.test_checkpoint import at_version, make_state
import jax

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

folder, moment = sys.argv[1:]
mesh = models.make_mesh(jax.devices()[:1])
optimizer = state.make_optimizer(toy.settings())
checkpoints = Checkpoints(folder)
checkpoints.save(at_version(make_state(mesh, optimizer), 1), b"one", {"n": 1}, wait=True)
if moment == "before it gets its name":
    os.rename = os.replace = die  # the last thing that happens to a checkpoint
checkpoints.save(at_version(make_state(mesh, optimizer, seed=1), 2), b"two", {"n": 2})
if moment == "while it is written":
    die()
checkpoints.wait()
die()
"""


def at_version(made, version):
    return dataclasses.replace(made, version=jax.device_put(np.int32(version), made.version.sharding))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "newest"), [("while it is written", 1), ("before it gets its name", 1), ("after it got its name", 2)]
)
def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_one_whole(tmp_path, optimizer, moment, newest):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "c"), moment]
    killed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    mesh = models.make_mesh(jax.devices()[:1])
    expected = at_version(make_state(mesh, optimizer, seed=newest - 1), newest)
    checkpoints = Checkpoints(tmp_path / "c")
    restored = checkpoints.restore(expected)
    assert restored.memory == {"n": newest} and restored.controller == (b"one", b"two")[newest - 1]
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(restored.state), strict=True):
        np.testing.assert_array_equal(np.asarray(want), np.asarray(got))
    assert checkpoints.save(at_version(make_state(mesh, optimizer), 3), b"", {}, wait=True)
    checkpoints.close()
    assert not list((tmp_path / "c").glob("*tmp*"))
