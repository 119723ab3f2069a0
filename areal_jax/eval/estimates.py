"""What a set of answers says about a model: pass@k and averages, each with a 95 % confidence interval.

A problem's answers are one row; problems are the independent draws, so intervals come from resampling problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over problems, the ends of its 95 % confidence interval, and how those were found."""

    value: float
    low: float
    high: float
    method: str  # "wilson" or "bootstrap over problems"


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers is right, from `correct` right ones among n >= k; unbiased.

    1 - C(n - correct, k) / C(n, k) (arXiv 2107.03374, Eq. 1), as a product, so that no large number appears.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= correct <= n and 1 <= k <= n, found n={n}, correct={correct}, k={k}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion; unlike a bootstrap it is not empty when all or none succeed."""
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_over_problems(values: Sequence[float], *, one_answer_each: bool = False, seed: int = 0) -> Estimate:
    """The mean of one number per problem (at least one problem).

    The interval is Wilson's where every problem has one answer that is right or wrong, and where all problems are
    wholly right or all wholly wrong (no resample would differ); else the percentiles of 10,000 resamples of the
    problems (`seed` fixes them).
    """
    x = np.asarray(values, np.float64)
    value = float(x.mean())
    found = set(x.tolist())
    if found <= {0.0, 1.0} and (one_answer_each or len(found) == 1):
        return Estimate(value, *wilson(int(x.sum()), len(x)), "wilson")
    random = np.random.default_rng(seed)
    means = np.concatenate([
        x[random.integers(0, len(x), (rows, len(x)))].mean(axis=1) for rows in _blocks(_RESAMPLES, len(x))
    ])  # fmt: skip
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(value, float(low), float(high), "bootstrap over problems")


def summarize(accuracies: Sequence[Sequence[float]], ks: Sequence[int], *, seed: int = 0) -> dict[str, Estimate]:
    """avg@n and pass@k for those `ks` that every problem has answers enough for.

    Args:
      accuracies: for each problem with at least one judged answer, the accuracy of each; 1 counts as right in pass@k.
      ks: which k to estimate.
    """
    fewest = min(len(row) for row in accuracies)
    most = max(len(row) for row in accuracies)
    single = most == 1
    found = {f"avg@{most}": mean_over_problems([np.mean(row) for row in accuracies], one_answer_each=single, seed=seed)}
    for k in sorted(set(ks)):
        if 1 <= k <= fewest:
            each = [pass_at_k(len(row), sum(a >= 1.0 for a in row), k) for row in accuracies]
            found[f"pass@{k}"] = mean_over_problems(each, one_answer_each=single, seed=seed)
    return found


def _blocks(total: int, width: int) -> list[int]:
    """`total` rows in blocks of at most some million numbers."""
    rows = max(1, 4_000_000 // width)
    return [min(rows, total - start) for start in range(0, total, rows)]
