"""Packing keeps every token once, in order, and always in the same shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_jax.trainer import packing


def make_samples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for n in lengths:
        mask = np.arange(n) >= n // 3
        samples.append(
            packing.Sample(
                tokens=rng.integers(1, 90, n).astype(np.int32),
                mask=mask,
                behavior_logprobs=np.where(mask, -rng.random(n), 0).astype(np.float32),
                versions=np.where(mask, rng.integers(0, 5, n), -1).astype(np.int32),
                advantages=float(rng.normal()),
            )
        )
    return samples


def test_allocation_follows_the_papers_algorithm():
    """The hand-worked vector: sums 450, 450, 100; the optimum would be two bins."""
    bins = packing.allocate([100, 200, 300, 150, 250], 500, min_bins=2)
    assert [set(b) for b in bins] == [{2, 3}, {4, 1}, {0}]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=0, max_size=60), st.integers(1, 8), st.integers(1, 5))
def test_every_token_is_packed_once_and_comes_back(lengths, max_segments, rows):
    samples = make_samples(lengths)
    packed = packing.pack(samples, rows=rows, row_length=64, max_segments=max_segments)
    assert packed.arrays["tokens"].shape == (len(packed), rows, 64)
    assert (packed.arrays["segment_ids"] > 0).sum() == sum(lengths)
    assert packed.arrays["segment_ids"].max() <= max_segments
    assert packed.num_tokens == sum(int(s.mask[1:].sum()) for s in samples)
    if not lengths:
        return
    for name, want in (("tokens", "tokens"), ("versions", "versions"), ("behavior_logprobs", "behavior_logprobs")):
        for got, sample in zip(packed.unpack(packed.arrays[name]), samples, strict=True):
            keep = sample.mask & (np.arange(len(got)) > 0)
            np.testing.assert_array_equal(got[keep], getattr(sample, want)[keep])
    for got, sample in zip(packed.unpack(packed.arrays["tokens"]), samples, strict=True):
        np.testing.assert_array_equal(got, sample.tokens)
    for got, sample in zip(packed.unpack(packed.arrays["advantages"]), samples, strict=True):
        assert set(np.unique(got)) <= {np.float32(0), np.float32(sample.advantages)}


def test_segments_are_contiguous_and_positions_restart():
    packed = packing.pack(make_samples([5, 9, 3, 16, 7, 2]), rows=2, row_length=16, max_segments=8)
    for row_segments, row_positions in zip(
        packed.arrays["segment_ids"].reshape(-1, 16), packed.arrays["positions"].reshape(-1, 16), strict=True
    ):
        for segment in range(1, row_segments.max() + 1):
            where = np.flatnonzero(row_segments == segment)
            np.testing.assert_array_equal(where, np.arange(where[0], where[-1] + 1))
            np.testing.assert_array_equal(row_positions[where], np.arange(len(where)))


def test_fixed_packing_is_one_sequence_per_row():
    packed = packing.pack_fixed(make_samples([5, 9, 3]), sequences=2, row_length=16)
    assert packed.arrays["tokens"].shape == (2, 2, 16)
    np.testing.assert_array_equal(packed.arrays["sequence_ids"][:, :, 0], [[0, 1], [2, -1]])
    assert packed.arrays["segment_ids"].max() == 1


def test_a_sequence_longer_than_a_row_says_what_to_set():
    with pytest.raises(packing.PackingError, match=r"sequence 1 has 17 tokens.*trainer\.row_length"):
        packing.pack(make_samples([4, 17]), rows=1, row_length=16, max_segments=4)
    with pytest.raises(packing.PackingError, match="0 tokens"):
        packing.pack(make_samples([0]), rows=1, row_length=16, max_segments=4)


def test_packing_is_dense():
    """Real length mixes fill more than nine tenths of the rows (the last micro-batch aside)."""
    lengths = np.random.default_rng(3).integers(40, 160, 2048)
    bins = packing.allocate(lengths, 512)
    assert lengths.sum() / (len(bins) * 512) > 0.9
