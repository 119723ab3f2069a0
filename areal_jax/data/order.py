"""The order in which one epoch visits a data set; the same everywhere and for ever, given seed and epoch."""

from __future__ import annotations

import numpy as np


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Record indices of epoch `epoch`, int64 [n]: a permutation of 0 .. n - 1 that depends on seed and epoch only.

    It sorts raw Philox output, which numpy promises never to change (unlike `Generator.permutation`).
    """
    if not shuffle:
        return np.arange(n)
    key = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))
    return np.argsort(key.random_raw(n), kind="stable")
