"""The pure steps of training, jitted with fixed shapes on a mesh: log-probs, accumulate one micro-batch, update.

One optimizer update = `accumulate` over the micro-batches of a minibatch, then `update`. Every sum is divided by the
denominator of the whole minibatch, so packing, micro-batching and the mesh do not change the result. The accumulator
and the state are donated; metrics are sums that add up on the device and are fetched once per step.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from areal_jax.losses import Weighted
from areal_jax.trainer import measure, state
from areal_jax.trainer.objectives import Objective
from areal_jax.trainer.packing import MicroBatch
from areal_jax.trainer.state import Optimizer, TrainState

Tree = Any
ON_DEVICE = ("tokens", "positions", "segment_ids", "mask", "behavior_logprobs", "advantages", "versions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond any of these an update is not applied; nor is one whose loss or gradient is not finite, ever."""

    grad_norm: float = float("inf")
    ratio: float = float("inf")  # of any token: π_prox / π_behav
    mismatch: float = float("inf")  # mean |Δ log-prob| of engine and trainer over tokens of lag 0

    def good(self, norm: jax.Array, sums: measure.Sums, before: measure.Sums) -> jax.Array:
        """Whether an update with this gradient norm may be applied; a bool scalar.

        `sums` are the minibatch's own metrics, so that a bad one does not condemn the next, and `before` those of the
        step's minibatches before it: the engine's mismatch is a matter of them all, and often measured on the first.
        """
        good = jnp.isfinite(norm) & jnp.isfinite(sums["mean"]["actor/loss"].sum) & (norm <= self.grad_norm)
        good &= sums["max"]["is/max"] <= self.ratio
        if self.mismatch < float("inf"):
            mismatch = [x["mean"]["mismatch/logprob_abs_difference"] for x in (before, sums)]
            good &= sum(mismatch).mean() <= self.mismatch
        return good


def scalars(num_tokens: int, num_sequences: int, version: int, measured: bool = True) -> dict[str, np.generic]:
    """What a minibatch needs besides its arrays, as numpy scalars, whose values never recompile anything.

    `version` is that of the parameters before this training step; `measured` says that they have not changed since, so
    that the current log-probs measure the engine's mismatch.
    """
    return {
        "num_tokens": np.float32(max(1, num_tokens)),
        "num_sequences": np.float32(max(1, num_sequences)),
        "version": np.int32(version),
        "measured": np.bool_(measured),
    }


class Steps:
    """The jitted functions for one model, objective, optimizer and mesh.

    Args:
      model: has `token_logprobs` and `token_loss`, as `models.Model`.
      objective: what is minimised (`objectives.Objective`).
      optimizer: `state.Optimizer`.
      mesh: axes `data`, `fsdp` (rows of a micro-batch are split over both), `tensor`, `expert`.
      example: a `TrainState`, possibly abstract, whose shardings everything keeps.
      temperature: what the logits are divided by; the rollout's.
      limits: which updates are not applied.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        optimizer: Optimizer,
        mesh: Mesh,
        example: TrainState,
        *,
        temperature: float = 1.0,
        limits: Limits = Limits(),
    ):
        self.model, self.objective, self.optimizer, self.mesh = model, objective, optimizer, mesh
        self.temperature, self.limits = temperature, limits
        self._rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        where = state.state_shardings(example.params, optimizer, mesh)
        gradients = state.partition(where.params, optimizer.trained)[0]
        self.logprobs = jax.jit(self._logprobs, out_shardings=self._rows)
        # The reference is the checkpoint the run began with, which has no adapters.
        base = model.with_(lora=None)
        self.reference_logprobs = jax.jit(partial(self._logprobs, model=base), out_shardings=self._rows)
        self.accumulate = jax.jit(self._accumulate, donate_argnums=(1, 2), out_shardings=(gradients, self._replicated))
        self.update = jax.jit(self._update, donate_argnums=(0, 1), out_shardings=(where, gradients, self._replicated))
        self._zeros = jax.jit(
            lambda params: jax.tree.map(
                lambda x: jnp.zeros(x.shape, jnp.float32), state.partition(params, optimizer.trained)[0]
            ),
            out_shardings=gradients,
        )
        # Traced once: the metrics' names come from tracing the objective.
        self._no_sums = jax.jit(
            lambda: jax.tree.map(jnp.asarray, objective.zero_sums()), out_shardings=self._replicated
        )

    # -- placing ---------------------------------------------------------------------------------------------------

    def put(self, micro_batch: MicroBatch) -> dict[str, jax.Array]:
        """A micro-batch on the mesh. Every process holds the same arrays and copies only the rows of its devices."""
        return self.put_rows({name: getattr(micro_batch, name) for name in ON_DEVICE})

    def put_rows(self, arrays: Tree) -> Tree:
        """A tree of `[rows, row_length]` arrays on the mesh."""
        if jax.process_count() == 1:
            return jax.device_put(arrays, self._rows)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, self._rows, x.__getitem__), arrays)

    def zero_gradients(self, params: Tree) -> Tree:
        """A fresh accumulator; needed once, `update` hands it back emptied."""
        return self._zeros(params)

    def zero_metrics(self) -> measure.Sums:
        """Metrics of nothing; where a minibatch begins."""
        return self._no_sums()

    # -- the three steps -------------------------------------------------------------------------------------------

    def _forward(self, params: Tree, micro: dict[str, jax.Array], model: Any = None):
        return (model or self.model).token_logprobs(params, *_rows(micro), self.temperature)

    def _logprobs(self, params: Tree, micro: dict[str, jax.Array], model: Any = None) -> jax.Array:
        """Log-probs of a micro-batch under `params`, float32 `[rows, row_length]`: the proximal or reference pass."""
        return self._forward(params, micro, model)[0]

    def _accumulate(
        self,
        params: Tree,
        gradients: Tree,
        sums: measure.Sums,
        micro: dict[str, jax.Array],
        scalars: dict[str, jax.Array],
        proximal: jax.Array | None,
        reference: jax.Array | None,
        keep: jax.Array | None,
    ) -> tuple[Tree, measure.Sums]:
        """Adds the gradient and the metrics of one micro-batch.

        `proximal` is given for the objective's proximal mode "recompute", `reference` where it has a KL penalty, `keep`
        (bool) where a correction over the whole batch has decided which tokens stay.
        """
        trained, frozen = state.partition(params, self.optimizer.trained)

        def by_token(logprobs, entropy, arrays):
            (micro, *given), scalars = arrays
            return self.objective.loss(logprobs, entropy, micro, scalars, *given)

        def loss_fn(trained):
            current, arrays = state.merge(trained, frozen), ((micro, proximal, reference, keep), scalars)
            if self.objective.token_level:
                return self.model.token_loss(current, *_rows(micro), by_token, arrays, self.temperature)
            return by_token(*self._forward(current, micro), arrays)

        (_, added), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        gradients = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), gradients, grads)
        return gradients, measure.add(sums, added)

    def _update(
        self,
        train_state: TrainState,
        gradients: Tree,
        sums: measure.Sums,
        before: measure.Sums,
        new_version: jax.Array,
        apply: jax.Array,
    ) -> tuple[TrainState, Tree, measure.Sums]:
        """Clips and applies one optimizer update; hands back an emptied accumulator and all metrics with the norms.

        `sums` are of this minibatch, `before` of the step's minibatches before it. What is beyond the limits leaves
        parameters and moments untouched and is counted as skipped; `apply=False` does the same without counting (used
        to compile before there is data).
        """
        norm = optax.tree.norm(gradients)
        good = self.limits.good(norm, sums, before)
        scale = jnp.minimum(1.0, self.optimizer.max_grad_norm / jnp.maximum(norm, 1e-20))
        clipped = jax.tree.map(lambda g: jnp.where(good, g * scale, 0.0), gradients)
        trained, frozen = state.partition(train_state.params, self.optimizer.trained)
        updates, opt_state, rate = self.optimizer.update(clipped, train_state.opt_state, trained)
        updated = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), trained, updates)
        take = good & apply
        pick = partial(jax.tree.map, lambda new, old: jnp.where(take, new, old))
        new_state = TrainState(
            state.merge(pick(updated, trained), frozen), pick(opt_state, train_state.opt_state), new_version
        )
        count = apply.astype(jnp.float32)
        measured = {
            "actor/loss": jnp.zeros((), jnp.float32),  # its sum is there already
            "actor/grad_norm": jnp.where(jnp.isfinite(norm), norm, jnp.inf),
            "actor/update_norm": jnp.where(good, optax.tree.norm(updates), 0.0),
            "actor/learning_rate": rate,
            "actor/skipped_updates": 1.0 - good.astype(jnp.float32),
        }
        added = {name: Weighted(jnp.where(apply, x, 0.0).astype(jnp.float32), count) for name, x in measured.items()}
        sums = measure.add(before, measure.add(sums, {"mean": added, "max": {}}))
        return new_state, jax.tree.map(jnp.zeros_like, gradients), sums


def _rows(micro: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    return micro["tokens"], micro["positions"], micro["segment_ids"]


class CompileCounter:
    """Counts XLA compilations of this process, whatever they are of, through jax's own monitoring events."""

    _count = 0
    _listening = False

    def __init__(self):
        cls = CompileCounter
        if not cls._listening:
            cls._listening = True
            jax.monitoring.register_event_duration_secs_listener(cls._heard)
        self._start = cls._count

    @staticmethod
    def _heard(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            CompileCounter._count += 1

    @property
    def count(self) -> int:
        """Compilations since this counter was made."""
        return CompileCounter._count - self._start

    def restart(self) -> None:
        """Begin again from zero."""
        self._start = CompileCounter._count
