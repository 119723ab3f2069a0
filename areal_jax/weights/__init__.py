"""One version of the weights, from the trainer to every worker: a manifest (what is where) and bytes.

`Publisher` writes versions: into shared memory (`shm`), the same with a byte server for other hosts (`tcp`), or on a
shared disk (`disk`). `open_version` finds, fetches if need be, verifies and maps one. Neither imports jax or torch.
"""

from areal_jax.weights.publisher import Publisher
from areal_jax.weights.receiver import OpenVersion, open_version, same_layout
from areal_jax.weights.store import WeightsRefused, cleanup

__all__ = ["OpenVersion", "Publisher", "WeightsRefused", "cleanup", "open_version", "same_layout"]
