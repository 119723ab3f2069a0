"""Fully asynchronous reinforcement learning for language models, in JAX.

The library: `areal_jax.losses`, `areal_jax.advantages`, `areal_jax.corrections`. The network: `areal_jax.models`. The
system is four roles, each a package with a `__main__`: `controller`, `rollout`, `rewards`, `trainer`; `launch` starts
them all on one machine. Importing this package imports nothing else.
"""

__version__ = "0.1.0"
