"""Sequences of any length into micro-batches of one fixed shape. Pure numpy; decides and copies, computes nothing else.

Rows hold whole sequences one after another (`segment_ids` 1, 2, ... within a row, 0 is padding; `positions` restart
with each). A micro-batch is a fixed number of rows, so that everything jitted sees one shape.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from areal_jax.trainer.config import TrainerConfig

# Shortest sequence that rows are dimensioned for: row_length / this many segments fit in a row.
TOKENS_PER_SEGMENT = 8
MAX_SEGMENTS = 64


class PackingError(ValueError):
    """The sequences cannot be packed as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence to train on; all arrays `[T]`, aligned with the token they describe."""

    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool: sampled by the policy, so trained on
    behavior_logprobs: np.ndarray  # float32
    versions: np.ndarray  # int32: of the weights that sampled the token, -1 where mask is False
    advantages: np.ndarray | float = 0.0  # float32, or one number for the whole sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed rows; every array `[rows, row_length]`."""

    tokens: np.ndarray  # int32; 0 in padding
    positions: np.ndarray  # int32, from 0 in each segment
    segment_ids: np.ndarray  # int32, from 1 in each row; 0 is padding
    sequence_ids: np.ndarray  # int32 index into the samples that were packed; -1 is padding
    mask: np.ndarray  # bool
    behavior_logprobs: np.ndarray  # float32
    advantages: np.ndarray  # float32; 0 where mask is False
    versions: np.ndarray  # int32; -1 where mask is False


FIELDS = tuple(field.name for field in dataclasses.fields(MicroBatch))
_FILL = {"sequence_ids": -1, "versions": -1}
_DTYPES = {"mask": np.bool_, "behavior_logprobs": np.float32, "advantages": np.float32}


@dataclasses.dataclass(frozen=True)
class Packed:
    """Micro-batches as stacked arrays `[M, rows, row_length]`, and the global denominators of the loss."""

    arrays: dict[str, np.ndarray]
    num_tokens: int  # trained tokens of all samples
    num_sequences: int  # samples with at least one trained token

    def __len__(self) -> int:
        return self.arrays["tokens"].shape[0]

    def __iter__(self) -> Iterator[MicroBatch]:
        for i in range(len(self)):
            yield MicroBatch(**{name: array[i] for name, array in self.arrays.items()})

    @property
    def fill(self) -> float:
        """Share of the computed positions that hold a token."""
        return float(np.mean(self.arrays["segment_ids"] > 0))

    def unpack(self, packed: np.ndarray) -> list[np.ndarray]:
        """`[M, rows, row_length]` values back to one array `[T]` for each sample, in their order before packing."""
        ids = self.arrays["sequence_ids"].reshape(-1)
        used = np.flatnonzero(ids >= 0)
        order = used[np.lexsort((self.arrays["positions"].reshape(-1)[used], ids[used]))]
        counts = np.bincount(ids[used])
        return np.split(np.asarray(packed).reshape(-1)[order], np.cumsum(counts)[:-1])


def allocate(
    lengths: Sequence[int], capacity: int, *, min_bins: int = 1, max_items: int | None = None
) -> list[list[int]]:
    """Dynamic allocation of sequences to bins of `capacity` tokens: AReaL, Algorithm 1 (arXiv 2505.24298, app. B.3).

    From the longest sequence to the shortest: open a bin while there are fewer than `min_bins` or none has room;
    otherwise take, among the bins with room, the one with the fewest sequences (then the fewest tokens).

    Args:
      lengths: tokens of each sequence, each between 1 and `capacity`.
      max_items: sequences in one bin at most.

    Returns:
      The indices of the sequences in each bin; every index once.
    """
    lengths = np.asarray(lengths, np.int64)
    check_lengths(lengths, capacity)
    sums, counts = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    max_items = max_items or len(lengths)
    bins: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        n = len(bins)
        room = np.flatnonzero((sums[:n] + lengths[i] <= capacity) & (counts[:n] < max_items))
        if n < min_bins or room.size == 0:
            bins.append([int(i)])
            chosen = n
        else:
            chosen = int(room[np.argmin(counts[room] * (capacity + 1) + sums[room])])
            bins[chosen].append(int(i))
        sums[chosen] += lengths[i]
        counts[chosen] += 1
    return bins


def max_segments(config: TrainerConfig) -> int:
    """Sequences that one row may hold; static, for sums over sequences and for the tables of flash attention."""
    if config.packing == "fixed":
        return 1
    return config.max_segments or min(MAX_SEGMENTS, max(1, config.row_length // TOKENS_PER_SEGMENT))


def check_lengths(lengths: np.ndarray, row_length: int) -> None:
    """Raises `PackingError` for an empty sequence or one that does not fit a row."""
    if len(lengths) and (lengths.max() > row_length or lengths.min() < 1):
        bad = int(np.argmax((lengths > row_length) | (lengths < 1)))
        raise PackingError(
            f"sequence {bad} has {lengths[bad]} tokens, but a row holds 1 to {row_length}: "
            "set trainer.row_length to at least rollout.max_length"
        )


def pack(samples: Sequence[Sample], *, rows: int, row_length: int, max_segments: int, shuffle_seed: int = 0) -> Packed:
    """Packs samples into as many micro-batches of `[rows, row_length]` as they need (at least one).

    Rows are filled by `allocate`; where a row goes is a fixed shuffle, so that no micro-batch gets all the long ones.
    """
    lengths = np.array([len(sample.tokens) for sample in samples], np.int64)
    allocated = allocate(lengths, row_length, max_items=max_segments)
    order = np.random.default_rng(shuffle_seed).permutation(len(allocated))
    return _fill(samples, lengths, [allocated[i] for i in order], rows, row_length)


def pack_fixed(samples: Sequence[Sample], *, sequences: int, row_length: int) -> Packed:
    """One sample per row, padded to `row_length`, `sequences` rows per micro-batch: what packing is compared with."""
    lengths = np.array([len(sample.tokens) for sample in samples], np.int64)
    check_lengths(lengths, row_length)
    return _fill(samples, lengths, [[i] for i in range(len(samples))], sequences, row_length)


def _fill(samples, lengths: np.ndarray, row_items: list[list[int]], rows: int, row_length: int) -> Packed:
    count = max(1, -(-len(row_items) // rows))
    shape = (count, rows, row_length)
    arrays = {name: np.full(shape, _FILL.get(name, 0), _DTYPES.get(name, np.int32)) for name in FIELDS}
    order = np.array([i for items in row_items for i in items], np.int64)
    if len(order):
        sizes = lengths[order]
        segment = np.concatenate([np.arange(1, len(items) + 1) for items in row_items])
        row = np.repeat(np.arange(len(row_items)), [len(items) for items in row_items])
        ends = np.cumsum(sizes)
        row_starts = np.concatenate([[0], ends])[np.searchsorted(row, row)]  # tokens before the row's first sequence
        starts = row * row_length + (ends - sizes - row_starts)
        positions = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        where = np.repeat(starts, sizes) + positions
        ordered = [samples[i] for i in order]

        def put(name, values):
            arrays[name].reshape(-1)[where] = values

        mask = np.concatenate([sample.mask for sample in ordered]).astype(bool)
        mask &= positions > 0  # the first token has no log-prob
        put("tokens", np.concatenate([sample.tokens for sample in ordered]))
        put("positions", positions)
        put("segment_ids", np.repeat(segment, sizes))
        put("sequence_ids", np.repeat(order, sizes))
        put("mask", mask)
        put("behavior_logprobs", np.where(mask, np.concatenate([s.behavior_logprobs for s in ordered]), 0))
        advantages = np.concatenate([np.broadcast_to(s.advantages, len(s.tokens)) for s in ordered])
        put("advantages", np.where(mask, advantages, 0))
        put("versions", np.where(mask, np.concatenate([s.versions for s in ordered]), -1))
    mask, ids = arrays["mask"], arrays["sequence_ids"]
    return Packed(arrays, int(mask.sum()), len(np.unique(ids[mask])))
