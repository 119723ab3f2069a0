"""One training step after another: holds the state, packs a batch, runs the jitted steps in order. Knows no process.

A step goes: minibatches -> packed micro-batches -> proximal and reference log-probs of all of them under the parameters
as they are -> for each minibatch, accumulate gradients over its micro-batches and update once -> version + 1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from areal_jax.models import Model, make_mesh
from areal_jax.trainer import batch as batch_lib
from areal_jax.trainer import measure, memory, packing, steps
from areal_jax.trainer import state as state_lib
from areal_jax.trainer.batch import TrainBatch
from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.objectives import Objective, ObjectiveError, make
from areal_jax.trainer.packing import Packed, Sample, max_segments

Tree = Any


def make_objective(config: TrainerConfig, *, horizon: float = 1.0) -> Objective:
    """The objective that the settings name, checked; `horizon` is the longest answer in tokens."""
    return make(
        config.objective,
        config.objective_args,
        correction=config.correction,
        correction_args=config.correction_args,
        aggregate=config.aggregate,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        proximal=config.proximal,
        minibatches=config.minibatches,
        num_segments=max_segments(config),
        horizon=horizon,
    )


def mesh_of(config: TrainerConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the settings over all devices; a size of -1 takes what is left."""
    devices = jax.devices() if devices is None else list(devices)
    try:
        sizes = memory.mesh_sizes(config, len(devices))
    except ValueError as error:
        raise ObjectiveError(str(error)) from None
    rows, shards = _rows(config), sizes["data"] * sizes["fsdp"]
    if rows % shards:
        name = "trainer.fixed_sequences" if config.packing == "fixed" else "trainer.rows"
        raise ObjectiveError(f"{name}={rows} must be a multiple of data_parallel x fsdp = {shards}")
    return make_mesh(devices, **sizes)


def _rows(config: TrainerConfig) -> int:
    return config.fixed_sequences if config.packing == "fixed" else config.rows


@dataclasses.dataclass
class Pending:
    """A dispatched step whose metrics are still on the device; `report` fetches them."""

    version: int  # the version that the step made
    sums: measure.Sums
    packed: list[Packed]
    data: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """The step's metrics; waits for the step."""
        report = measure.finish(jax.device_get(self.sums))
        report["packing/micro_batches"] = sum(len(p) for p in self.packed)
        report["packing/fill"] = float(np.mean([p.fill for p in self.packed]))
        return report | self.data


class Learner:
    """The trainer without the rest of the system.

    Args:
      model, params: as from `models.load_hf(path, mesh=mesh)`.
      config: the settings.
      mesh: where everything lives.
      objective: from `make_objective`.
      reference: parameters of the reference model; needed with `kl_coef` above 0.
      temperature: the rollout's.
      train_state: go on from this state instead of a fresh one with `params`.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        config: TrainerConfig,
        *,
        mesh: Mesh,
        objective: Objective,
        reference: Tree | None = None,
        temperature: float = 1.0,
        train_state: state_lib.TrainState | None = None,
    ):
        self.config, self.mesh, self.objective, self.reference = config, mesh, objective, reference
        self.model = model
        self.optimizer = state_lib.make_optimizer(config)
        self.state = train_state or state_lib.create(params, self.optimizer, mesh)
        limits = steps.Limits(
            grad_norm=config.grad_norm_limit or float("inf"),
            ratio=config.ratio_limit or float("inf"),
            mismatch=config.mismatch_limit or float("inf"),
        )
        self.steps = steps.Steps(
            model, objective, self.optimizer, mesh, self.state, temperature=temperature, limits=limits
        )
        self.gradients = self.steps.zero_gradients(self.state.params)
        self.version = int(self.state.version)
        self._keep: dict[int, Any] = {}  # the correction over a whole minibatch, compiled, by its micro-batches

    def warm_up(self, samples: int = 0) -> None:
        """Compiles everything a step with so many samples needs, on a batch of padding, without changing the state."""
        if self.objective.whole_batch:
            for doublings in range(_doublings(-(-samples // _rows(self.config))) + 1):
                self._keep_of(1 << doublings)
        empty = TrainBatch(self.version, [], np.zeros(0, np.int32), {})
        self._run(empty, [self._pack([])] * self.config.minibatches, lambda: None, apply=False)
        measure.finish(jax.tree.map(np.ones_like, self.objective.zero_sums()))
        jax.block_until_ready(self.state)

    def step(self, batch: TrainBatch, *, before_update: Callable[[], None] = lambda: None) -> Pending:
        """Trains on one global batch and returns at once; the state is then that of the next version.

        Args:
          batch: of `version` equal to the learner's.
          before_update: called when nothing reads the old parameters any more but the caller; after it returns, they
            are overwritten.
        """
        if batch.version != self.version:
            raise ValueError(f"batch of version {batch.version} given to a trainer at version {self.version}")
        parts = batch_lib.split(batch, self.config.minibatches, self.config.seed)
        return self._run(batch, [self._pack(part) for part in parts], before_update, apply=True)

    def _pack(self, samples: Sequence[Sample]) -> Packed:
        c = self.config
        if c.packing == "fixed":
            return packing.pack_fixed(samples, sequences=c.fixed_sequences, row_length=c.row_length)
        return packing.pack(samples, rows=c.rows, row_length=c.row_length, max_segments=max_segments(c))

    def _run(self, batch: TrainBatch, packed: list[Packed], before_update: Callable[[], None], apply: bool) -> Pending:
        version, run = self.version, self.steps
        parts = [[run.put(micro) for micro in part] for part in packed]
        proximal = reference = None
        if self.objective.recompute:
            proximal = [[run.logprobs(self.state.params, micro) for micro in micros] for micros in parts]
        if self.objective.kl_coef:
            reference = [[run.reference_logprobs(self.reference, micro) for micro in micros] for micros in parts]
        total = run.zero_metrics()
        for i, (part, micros) in enumerate(zip(packed, parts, strict=True)):
            keep = self._keep_tokens(part, proximal[i]) if self.objective.whole_batch else None
            sums = run.zero_metrics()
            scalars = steps.scalars(part.num_tokens, part.num_sequences, version, measured=i == 0)
            for j, micro in enumerate(micros):
                given = [
                    None if x is None else x[j] for x in (proximal and proximal[i], reference and reference[i], keep)
                ]
                self.gradients, sums = run.accumulate(self.state.params, self.gradients, sums, micro, scalars, *given)
            if i == 0:
                before_update()
            new_version = np.int32(version + (apply and i == len(parts) - 1))
            self.state, self.gradients, total = run.update(
                self.state, self.gradients, sums, total, new_version, np.bool_(apply)
            )
        self.version += apply
        return Pending(self.version, total, packed, batch.report)

    def _keep_tokens(self, packed: Packed, proximal: list[jax.Array]) -> list[jax.Array]:
        """What a correction over the whole minibatch keeps; on arrays padded to a few sizes, so as to compile few."""
        rows, size = packed.arrays["mask"].shape[1:], 1 << _doublings(len(packed))

        def padded(values):
            return np.concatenate([values, np.zeros((size - len(packed), *rows), values.dtype)])

        arrays = {name: padded(packed.arrays[name]) for name in ("behavior_logprobs", "advantages", "mask")}
        arrays["logprobs"] = padded(np.stack([_to_host(x) for x in proximal]))
        kept = np.asarray(self._keep_of(size)(arrays))
        return [self.steps.put_rows(kept[i]) for i in range(len(packed))]

    def _keep_of(self, micro_batches: int) -> Callable[[Tree], jax.Array]:
        if micro_batches not in self._keep:
            shape = (micro_batches, _rows(self.config), self.config.row_length)
            floats, bools = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.float32, np.bool_))
            arrays = {"behavior_logprobs": floats, "advantages": floats, "logprobs": floats, "mask": bools}
            self._keep[micro_batches] = jax.jit(self.objective.keep_over_batch).lower(arrays).compile()
        return self._keep[micro_batches]


def _doublings(count: int) -> int:
    """To reach `count`, from one."""
    return max(0, count - 1).bit_length()


def _to_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
