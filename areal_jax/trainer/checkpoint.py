"""One atomic checkpoint of everything a run needs to go on: training state, controller state, and what to remember.

Orbax writes in the background to a temporary folder and renames it, so that a crash or a full disk in the middle leaves
the previous checkpoint whole. Arrays are restored straight to their shards, on whatever mesh the new state has.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from areal_jax.config import one_line
from areal_jax.trainer.state import TrainState, path_name


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another model; the message says which and why."""


class CheckpointNotWritten(CheckpointError, OSError):
    """The disk may take it later."""


_WRITE_ERRORS = (OSError, ValueError, RuntimeError)  # a full disk is any of them, depending on who met it


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was saved, read back."""

    state: TrainState
    controller: bytes  # of messages.State
    memory: dict[str, Any]  # JSON: config, results so far


class Checkpoints:
    """The checkpoints of one run, below `folder`, numbered by version; the newest `keep` stay.

    A save in the background that fails is not raised but noted in `failed`, in words, for the caller to read and empty:
    a run does not end for a checkpoint that it may never need. With several processes, which must all make the same
    calls, it is raised, since the others cannot know.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self.folder, self.failed = Path(folder).absolute(), []
        self._keep, self._saving = keep, -1  # the version that is being written in the background
        self._raised = False  # that a save failed
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "controller": ocp.StandardCheckpointHandler()}
        handlers["memory"] = ocp.JsonCheckpointHandler()
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest version that was saved as a whole."""
        return self._manager.latest_step()

    def save(self, state: TrainState, controller: bytes, memory: dict[str, Any], *, wait: bool = False) -> bool:
        """Saves as of the state's version; returns when the arrays are copied, or with `wait` when all is on disk.

        Returns False if that version is there already, or if saving it failed. Raises `CheckpointNotWritten`
        in that case with `wait`, `CheckpointError` with several processes; not for the save before: only noted.
        """
        self.poll(wait=True)
        self._sweep()
        before = len(self.failed)
        version = int(state.version)
        if version in self._manager.all_steps():
            return False
        arrays = _flatten(state)
        if jax.default_backend() == "cpu":
            # There, Orbax's copy may be the buffer itself, which the next step overwrites.
            arrays = {name: jax.device_put(x, x.sharding, may_alias=False) for name, x in arrays.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            controller=ocp.args.StandardSave({"data": np.frombuffer(controller or b"\0", np.uint8)}),
            memory=ocp.args.JsonSave(memory | {"controller_bytes": len(controller)}),
        )
        self._saving = version
        try:
            self._manager.save(version, args=items)
        except _WRITE_ERRORS as error:
            self._give_up(error)
        if wait:
            self.wait(before)
        return version in self._manager.all_steps()

    def poll(self, wait: bool = False) -> None:
        """Notices whether the save in the background has failed; with `wait` not before it has ended."""
        if self._saving < 0 or (self._manager.is_saving_in_progress() and not wait):
            return
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as error:
            self._give_up(error)
        self._saving = -1

    def _give_up(self, error: Exception) -> None:
        reason = one_line(error)
        reason = reason if len(reason) < 300 else f"{reason[:150]} ... {reason[-150:]}"  # both ends say something
        self.failed.append(f"the checkpoint of version {self._saving} could not be written to {self.folder}: {reason}")
        self._saving = -1
        if jax.process_count() > 1:
            self._raised = True
            raise CheckpointError(self.failed.pop()) from error
        with contextlib.suppress(*_WRITE_ERRORS):  # the same ones once more
            self._manager.close()
        self._sweep()
        self._manager = self._open()

    def _sweep(self) -> None:
        """Removes what saves that failed have left: there may be no room for another one. Nothing may be saving."""
        if jax.process_count() == 1:
            for draft in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(draft, ignore_errors=True)

    def restore(self, like: TrainState, version: int | None = None) -> Restored:
        """Reads a version (default: the newest) into arrays with the shapes, dtypes and shardings of `like`.

        `like` may be abstract (`jax.ShapeDtypeStruct` with shardings).

        Raises:
          CheckpointError: there is none, it cannot be read, or its arrays are not those of `like`.
        """
        version = self.latest() if version is None else version
        if version is None:
            raise CheckpointError(f"there is no checkpoint in {self.folder}")
        wanted = _flatten(like)
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in wanted.items()}
        self._check_same(version, abstract)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            controller=ocp.args.StandardRestore(),
            memory=ocp.args.JsonRestore(),
        )
        try:
            read = self._manager.restore(version, args=items)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"checkpoint {version} in {self.folder} cannot be read: {error}") from error
        memory = dict(read["memory"])
        controller = np.asarray(read["controller"]["data"]).tobytes()[: memory.pop("controller_bytes")]
        leaves = [read["state"][name] for name in wanted]
        return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves), controller, memory)

    def _check_same(self, version: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> None:
        saved = self._manager.item_metadata(version)["state"]
        if saved is None:
            raise CheckpointError(f"there is no checkpoint of version {version} in {self.folder}")
        saved = saved.tree if hasattr(saved, "tree") else dict(saved)
        for name in sorted(set(saved) ^ set(abstract)):
            where = "in the checkpoint only" if name in saved else "missing in the checkpoint"
            raise CheckpointError(f"checkpoint {version} in {self.folder} is of another model: {name} is {where}")
        for name, x in abstract.items():
            if tuple(saved[name].shape) != x.shape or saved[name].dtype != x.dtype:
                found = f"{saved[name].dtype}{list(saved[name].shape)}"
                raise CheckpointError(
                    f"checkpoint {version} in {self.folder} is of another model: {name} is {found}, "
                    f"expected {x.dtype}{list(x.shape)}"
                )

    def wait(self, known: int = 0) -> None:
        """Until everything is on disk; raises `CheckpointNotWritten` for what `failed` has beyond the first `known`."""
        self.poll(wait=True)
        if found := self.failed[known:]:
            del self.failed[known:]
            raise CheckpointNotWritten("; ".join(found))

    def close(self) -> None:
        """Finish and free. What was raised before is not raised once more, in other words, in its place."""
        with contextlib.suppress(*(_WRITE_ERRORS if self._raised else ())):
            self.poll(wait=True)
            self._manager.close()


def _flatten(state: TrainState) -> dict[str, Any]:
    """{"params/embedding": array, "opt_state/0/mu/embedding": ..., "version": ...}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def read_memory(folder: str | os.PathLike) -> dict[str, Any]:
    """What the newest checkpoint remembers, without reading an array: `config`, results; for tools."""
    memory = _read(folder, memory=ocp.args.JsonRestore())["memory"]
    return json.loads(json.dumps(dict(memory)))


def read_controller(folder: str | os.PathLike) -> bytes:
    """The controller's state in the newest checkpoint, as `controller.snapshot.save` made it; for tools."""
    read = _read(folder, memory=ocp.args.JsonRestore(), controller=ocp.args.StandardRestore())
    return np.asarray(read["controller"]["data"]).tobytes()[: read["memory"]["controller_bytes"]]


def _read(folder: str | os.PathLike, **items: Any) -> Any:
    with ocp.CheckpointManager(Path(folder).absolute()) as manager:
        if manager.latest_step() is None:
            raise CheckpointError(f"there is no checkpoint in {folder}")
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
