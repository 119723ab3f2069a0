"""Parameters on their way from the devices to the host."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

GATHERED_BYTES = 2**30  # that every device holds of a parameter beside its own share


def host_pieces(x: jax.Array, by_rows: bool, timings: dict[str, float]) -> Iterator[tuple[int, np.ndarray]]:
    """`(first, rows)`: pieces of `x` along its first axis, in order; all of it at once where not `by_rows`.

    Of an array that is spread over several processes, which all must iterate, only the first process gets the values:
    the others' are zeros that take no memory. `timings["gather"]` grows by the seconds that this takes.
    """
    alone = _is_here(x)
    size = len(x) if alone or not by_rows else max(1, GATHERED_BYTES * len(x) // x.nbytes)
    for first in range(0, len(x), size):
        start = time.perf_counter()
        piece = np.asarray(x) if alone else _rows(x, first, min(size, len(x) - first))
        timings["gather"] = timings.get("gather", 0.0) + time.perf_counter() - start
        yield first, piece


def _is_here(x: jax.Array | np.ndarray) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _rows(x: jax.Array, first: int, size: int) -> np.ndarray:
    whole = _gather(NamedSharding(x.sharding.mesh, PartitionSpec()), size)(x, first)
    jax.block_until_ready(whole)  # or the next ones would be gathered beside it
    if jax.process_index() == 0:
        return np.asarray(whole.addressable_data(0))
    return np.broadcast_to(x.dtype.type(0), whole.shape)


@functools.lru_cache
def _gather(sharding: NamedSharding, size: int) -> Callable[[jax.Array, int], jax.Array]:
    return jax.jit(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size), out_shardings=sharding)
