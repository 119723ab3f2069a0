"""The training state: one frozen tree of arrays, its optimizer, and where its arrays live on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from areal_jax.models.lora import is_adapter
from areal_jax.trainer.config import TrainerConfig

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step changes. `params` are all of the model's; moments exist for the trained ones only."""

    params: Tree
    opt_state: Tree
    version: jax.Array  # int32 scalar: global batches applied


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with schedule and decay mask; clipping by global norm is done where the norm is measured (`steps`)."""

    transform: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]  # of the number of updates done
    max_grad_norm: float
    trained: Callable[[str], bool]  # of a parameter's path

    def update(self, gradients: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree, jax.Array]:
        """(what to add to the parameters, the new moments, the learning rate used); optax counts in Python scalars."""
        with jax.numpy_dtype_promotion("standard"):
            rate = jnp.asarray(self.learning_rate(opt_state[0].count), jnp.float32)  # of the updates done before
            directions, opt_state = self.transform.update(gradients, opt_state, _float32(params))
            return jax.tree.map(lambda x: -rate * x, directions), opt_state, rate

    def init(self, params: Tree) -> Tree:
        """Moments of zero for the trained parameters, float32 whatever the dtype of those."""
        return self.transform.init(_float32(partition(params, self.trained)[0]))


def make_optimizer(config: TrainerConfig) -> Optimizer:
    """The optimizer of a run. The schedule counts optimizer updates (steps times minibatches)."""
    rate = learning_rate(config)
    transform = optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )
    return Optimizer(transform, rate, config.max_grad_norm, is_adapter if config.lora_rank else lambda path: True)


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def learning_rate(config: TrainerConfig) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then constant, or down to zero at `steps` (linear or cosine)."""
    warmup, total = (steps * config.minibatches for steps in (config.warmup_steps, config.steps))
    rest = max(1, total - warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, 0.0, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, rest)
    else:
        raise ValueError(f"trainer.schedule={config.schedule!r} is not one of 'constant', 'linear', 'cosine'")
    if not warmup:
        return after
    # The first update already learns: step 0 of w has rate 1/w of the full one, not 0.
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def decays(params: Tree) -> Tree:
    """Which parameters weight decay applies to: matrices, not norms and biases (stacked layers add an axis to both)."""

    def matrix(path, _):
        name = path_name(path).rsplit("/", 1)[-1]
        return not (name.endswith(("norm", "bias", "scale")))

    return jax.tree_util.tree_map_with_path(matrix, params)


def path_name(path: tuple) -> str:
    """A leaf's path as "layers/attention/q/kernel"."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def partition(params: Tree, trained: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits into (trained, frozen), both of the full structure with None where the other one has the leaf."""
    keep = jax.tree_util.tree_map_with_path(lambda path, _: trained(path_name(path)), params)
    return (
        jax.tree.map(lambda k, x: x if k else None, keep, params),
        jax.tree.map(lambda k, x: None if k else x, keep, params),
    )


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def create(params: Tree, optimizer: Optimizer, mesh: Mesh, version: int = 0) -> TrainState:
    """The state at the start of a run, moments born on the shards of their parameters."""
    shardings = state_shardings(params, optimizer, mesh)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    return TrainState(params, init(params), jax.device_put(np.int32(version), shardings.version))


def abstract(params: Tree, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings, from abstract parameters that have them: to restore into."""
    shapes = TrainState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    where = state_shardings(params, optimizer, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where)


def state_shardings(params: Tree, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of the state; moments lie where their parameters do. `params` may be abstract."""
    replicated = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else replicated, params)
    opt_state = optax.tree_map_params(
        optimizer.transform,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        partition(where, optimizer.trained)[0],
        transform_non_params=lambda _: replicated,
    )
    return TrainState(where, opt_state, replicated)
