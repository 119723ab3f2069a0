"""The gate and the order of the data, in numbers."""

import numpy as np
import pytest

from areal_jax.controller.staleness import admits, capacity, feasible
from areal_jax.data.order import epoch_order


@pytest.mark.parametrize(
    ("concurrency", "batch", "eta", "version", "running", "expected"),
    [(10, 4, 2, 0, 0, 10), (100, 4, 2, 0, 0, 12), (1000, 4, 2, 5, 0, 32), (10, 4, 2, 0, 3, 7), (0, 4, 2, 5, 0, 32)],
)
def test_capacity_is_the_papers(concurrency, batch, eta, version, running, expected):
    found = capacity(
        max_concurrent=concurrency, batch_size=batch, eta=eta, version=version, accepted=0, running=running
    )
    assert found == expected


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("eta", [0, 1, 4])
@pytest.mark.parametrize("version", [0, 2])
def test_capacity_and_admission_are_the_same_rule(batch, eta, version):
    """The gate lets in group N exactly when ⌊(N - 1) / B⌋ ≤ version + η (Eq. 3)."""
    for count in range(4 * batch * (eta + version + 1)):
        left = capacity(max_concurrent=0, batch_size=batch, eta=eta, version=version, accepted=count, running=0)
        assert (left > 0) == admits(position=count + 1, batch_size=batch, eta=eta, weights=version)


def test_feasible_counts_what_is_due():
    assert feasible([0, 0, 1], batch_size=2, step=0)
    assert not feasible([0, 0, 0], batch_size=2, step=0), "three are due in a batch of two"
    assert not feasible([0, 1, 1, 1, 1], batch_size=2, step=0), "five are due in the first two batches"
    assert not feasible([0], batch_size=2, step=1), "its last batch is gone"
    assert feasible([], batch_size=1, step=7)


def test_an_epochs_order_is_a_permutation_fixed_for_ever():
    assert epoch_order(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert epoch_order(5, 1, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(3, -1, 0).dtype == np.int64
