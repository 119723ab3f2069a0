"""Where arrays live: rules from logical axes to mesh axes, for parameters, optimizer state and activations alike.

A mesh has any of the axes `data`, `fsdp`, `tensor`, `expert`, with Auto axis types. A rule names the mesh axes that a
logical axis is split over; mesh axes that the mesh lacks, that are already taken in the same array, or that do not
divide the dimension are left out, so that one checkpoint fits any mesh.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from areal_jax.models.config import ModelError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# logical axis -> mesh axes; a tuple of pairs, so that rules are hashable
Rules = tuple[tuple[str, tuple[str, ...]], ...]
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", ("tensor",)),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("expert", ("expert",)),
    ("expert_mlp", ("tensor",)),
)


def on_gpu() -> bool:
    """Whether programs are compiled for GPUs: some forms of a computation are faster there and slower on CPUs."""
    return jax.default_backend() == "gpu"


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over `data`, `fsdp`, `tensor`, `expert` (sizes default to 1), with Auto axis types.

    Raises:
      ModelError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := set(sizes) - set(MESH_AXES):
        raise ModelError(f"unknown mesh axes {sorted(unknown)}; known: {MESH_AXES}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if math.prod(shape) != len(devices):
        raise ModelError(
            f"mesh {dict(zip(MESH_AXES, shape))} needs {math.prod(shape)} devices, there are {len(devices)}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES) -> PartitionSpec:
    """The mesh axes of each dimension of an array with these logical axes and this shape; "batch" chooses last."""
    table, taken, spec = dict(rules), set(), [None] * len(shape)
    dimensions = list(enumerate(zip(axes, shape, strict=True)))
    for i, (axis, size) in sorted(dimensions, key=lambda d: d[1][0] == "batch"):
        chosen: list[str] = []
        for name in table.get(axis, ()):
            parts = mesh.shape.get(name, 1)
            if parts > 1 and name not in taken and size % (parts * math.prod(mesh.shape[c] for c in chosen)) == 0:
                chosen.append(name)
        taken.update(chosen)
        spec[i] = tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None
    return PartitionSpec(*spec)


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES) -> NamedSharding:
    """`partition_spec` on its mesh."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, rules))


def is_axes(x: object) -> bool:
    """Whether x is one array's logical axes: the leaf of a tree of axes."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def tree_shardings(mesh: Mesh, axes_tree, abstract_tree, rules: Rules = RULES):
    """The sharding of every array of a tree, from the matching trees of logical axes and of shapes."""
    return jax.tree.map(
        lambda axes, x: named_sharding(mesh, axes, x.shape, rules), axes_tree, abstract_tree, is_leaf=is_axes
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Constrains activations to a mesh by their logical axes; without a mesh it does nothing. Hashable."""

    mesh: Mesh | None
    rules: Rules = RULES

    def __call__(self, x: jax.Array, *axes: str | None, like: jax.Array | None = None) -> jax.Array:
        """`x`, split as an array of the shape of `like` (default x itself) with these axes is."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        shape = x.shape if like is None else like.shape
        return jax.lax.with_sharding_constraint(x, named_sharding(self.mesh, axes, shape, self.rules))

    def rows(self, table_VxD: jax.Array, ids_M: jax.Array) -> jax.Array:
        """`[M, D]`: rows of a table, split over D as the table is. Each device looks up its own columns, for the tokens
        of all devices that have the other columns; a constraint that splits M instead then trades columns for tokens.
        Left to itself, XLA gathers the rows of all tokens on every device where `data` and `fsdp` are both used."""
        if self.mesh is None or self.mesh.size == 1:
            return jnp.take(table_VxD, ids_M, axis=0)
        shape = (*ids_M.shape, table_VxD.shape[1])
        spec = partition_spec(self.mesh, ("batch", "embed"), shape, self.rules)
        ids_M = jax.lax.with_sharding_constraint(ids_M, NamedSharding(self.mesh, PartitionSpec(spec[0])))
        rows_MxD = jnp.take(table_VxD, ids_M, axis=0)
        return jax.lax.with_sharding_constraint(rows_MxD, NamedSharding(self.mesh, spec))

    def shard_shape(self, shape: Sequence[int], *axes: str | None) -> tuple[int, ...]:
        """The shape of one device's part of an array of `shape` with these axes."""
        if self.mesh is None:
            return tuple(shape)
        return named_sharding(self.mesh, axes, shape, self.rules).shard_shape(tuple(shape))

    def batch_shards(self, rows: int) -> int:
        """Into how many parts a batch of `rows` rows is split."""
        return rows // self.shard_shape((rows,), "batch")[0]


ANYWHERE = Place(None)  # leaves every array where it is
