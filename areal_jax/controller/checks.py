"""What a trajectory must be before anyone may train on it."""

from __future__ import annotations

import math

import numpy as np

from areal_jax.transport.messages import Trajectory

_ARRAYS = {
    name: np.dtype(dtype)
    for name, dtype in {"tokens": "int32", "loss_mask": "bool", "logprobs": "float32", "versions": "int32"}.items()
}


def fault(trajectory: Trajectory, newest: int) -> str | None:
    """What is wrong with `trajectory`, in words; None if it may be used. `newest`: the newest version there is."""
    shape = trajectory.tokens.shape
    for name, dtype in _ARRAYS.items():
        array = getattr(trajectory, name)
        if array.dtype != dtype or array.shape != shape or array.ndim != 1:
            return (
                f"{name} is {array.dtype.name}{list(array.shape)}, expected {dtype} and as long as tokens{list(shape)}"
            )
    sampled = trajectory.versions[trajectory.loss_mask]
    if sampled.size == 0:
        return "no token was sampled"
    if (trajectory.versions[~trajectory.loss_mask] != -1).any():
        return "a token that was not sampled has a version"
    if sampled.min() < 0 or sampled.max() > newest:
        return f"versions {sampled.min()} to {sampled.max()}, but there are only 0 to {newest}"
    if (sampled[1:] < sampled[:-1]).any():
        return "versions decrease"
    if not np.isfinite(trajectory.logprobs).all() or (trajectory.logprobs > 1e-3).any():
        return "log-probabilities are not finite, or above 0"
    if not all(map(math.isfinite, (trajectory.reward, *trajectory.metrics.values()))):
        return "a reward or metric is not finite"
    return None
