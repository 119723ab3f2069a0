"""The few compiled programs of the embedded engine, and their fixed shapes.

A prefill runs `prefill_rows` prompts of one length bucket and samples their next token; a decode advances every slot by
up to `steps` tokens. The cache is only as long as the longest running sequence needs, again in buckets: short sequences
do not pay for `max_length`. Where few slots are taken, a decode runs these alone: at the end of what the staleness gate
lets in there are few sequences for long. A sequence's bucket of prefill is that of its own length, so that its numbers
do not depend on its company.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from areal_jax.models import insert_cache, on_gpu, resize_cache
from areal_jax.rollout.sampling import draw, forbid, request_keys, sampling_logprobs
from areal_jax.rollout.slots import Rows

_FEW = 32  # slots: a decode of fewer costs nearly as much as one of half of them


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """Buckets from `smallest`, doubling, the last one exactly `largest`."""
    buckets = []
    while smallest < largest:
        buckets.append(smallest)
        smallest *= 2
    return (*buckets, largest)


def bucket(buckets: tuple[int, ...], n: int) -> int:
    """The smallest bucket that holds `n`."""
    return next(b for b in buckets if b >= n)


class Programs:
    """Compiled functions over (params, cache, rows), whose shapes follow from the settings given here alone.

    `model` needs `init_cache(slots, length, dtype)`, `prefill(params, cache, tokens, lengths, slots)` and
    `decode(params, cache, tokens, positions)`, over a cache as in `models.decode`.
    """

    def __init__(
        self, model, *, slots: int, max_length: int, steps: int, prefill_rows: int, dtype: Any, exact: bool = False
    ):
        self.slots, self.steps, self.prefill_rows = slots, steps, prefill_rows
        self.widths = powers_of_two(min(16, max_length), max_length)  # of prefills
        self.lengths = (max_length,) if exact else powers_of_two(min(32, max_length), max_length)  # of the cache
        # Of sequences in a decode. On a GPU a step mostly reads the weights, and fewer rows save nothing; on a CPU a
        # third program, for a quarter, would save little more and takes its time to compile.
        self.counts = (slots,) if exact or on_gpu() or slots < _FEW else (slots // 2, slots)
        self._model, self._dtype = model, jnp.dtype(dtype)
        self._functions = _functions(model, steps, self._dtype)
        self._prefill, self._first, self._decode, self._decode_few, self._insert, self._resize = self._functions
        self._compiled = 0

    def new_cache(self, length: int):
        """An empty cache of `length` (one of `lengths`) for all slots."""
        return self._model.init_cache(self.slots, length, self._dtype)

    def prefill(self, params, tokens, lengths):
        """Runs int32 `[prefill_rows, P]` `tokens`; returns (their cache, the logits of their next tokens)."""
        return self._prefill(params, tokens, lengths)

    def first(self, logits, lengths, source, rows: Rows):
        """The next tokens and log-probs of `rows`, each after the prompt of a prefill that `source` (int32) names."""
        return self._first(logits, lengths, source, rows)

    def insert(self, cache, part, source, slots):
        """Writes the prompts `source` of a prefill's cache into `slots` (out of range: nowhere); both of one length."""
        return self._insert(cache, part, source, slots)

    def decode(self, params, cache, rows: Rows):
        """Up to `steps` tokens for every row with `remaining`; returns (cache, tokens `[steps, S]`, log-probs)."""
        count = bucket(self.counts, np.count_nonzero(rows.remaining))
        if count == self.slots:
            return self._decode(params, cache, rows)
        slots = np.argsort(rows.remaining == 0, kind="stable")[:count].astype(np.int32)  # the running ones come first
        cache, few, logprobs_of_few = self._decode_few(params, cache, rows.take(slots), slots)
        tokens = np.zeros((self.steps, self.slots), np.int32)
        logprobs = np.zeros((self.steps, self.slots), np.float32)
        tokens[:, slots], logprobs[:, slots] = few, logprobs_of_few
        return cache, tokens, logprobs

    def resize(self, cache, length: int):
        """The cache cut or padded to `length`."""
        return self._resize(cache, length)

    def warm_up(self, params) -> None:
        """Compiles every program that can ever be called."""
        rows, first = Rows.idle(self.slots), Rows.idle(self.prefill_rows)
        lengths, nowhere = np.zeros(self.prefill_rows, np.int32), np.full(self.prefill_rows, self.slots, np.int32)
        parts = {}
        for width in self.widths:
            prompts = np.zeros((self.prefill_rows, width), np.int32)
            parts[width], logits = self.prefill(params, prompts, lengths)
            self.first(logits, lengths, lengths, first)
        for length in self.lengths:
            cache, _, _ = self._decode(params, self.new_cache(length), rows)
            for count in self.counts[:-1]:
                slots = np.arange(count, dtype=np.int32)
                cache, _, _ = self._decode_few(params, cache, rows.take(slots), slots)
            for width in self.widths:
                if width <= length:
                    cache = self.insert(cache, parts[width], lengths, nowhere)
            for other in set(self.lengths) - {length}:
                self.resize(cache, other)
            jax.block_until_ready(cache)
        self._compiled = self._cached()

    def recompiles(self) -> int:
        """Programs compiled since `warm_up`; anything but 0 is a fault."""
        return self._cached() - self._compiled

    def _cached(self) -> int:
        return sum(function._cache_size() for function in self._functions)


@functools.lru_cache(maxsize=8)
def _functions(model, steps: int, dtype):
    """The jitted functions; engines of one process that are alike share them, and what is compiled."""
    return (
        jax.jit(functools.partial(_prefill, model, dtype)),
        jax.jit(_first),
        jax.jit(functools.partial(_decode, model, steps), donate_argnums=1),
        jax.jit(functools.partial(_decode_few, model, steps), donate_argnums=1),
        jax.jit(_insert, donate_argnums=0),
        jax.jit(resize_cache, static_argnums=1),
    )


def _sample(logits, rows: Rows, keys, position, forced):
    logits = forbid(logits, rows.stop, forced > 0)
    logprobs = sampling_logprobs(logits, rows.temperature, rows.top_k, rows.top_p)
    return draw(logprobs, keys, position, rows.temperature)


def _prefill(model, dtype, params, tokens, lengths):
    count, width = tokens.shape
    cache = model.init_cache(count, width, dtype)
    logits, cache = model.prefill(params, cache, tokens, lengths, jnp.arange(count, dtype=jnp.int32))
    return cache, logits


def _first(logits, lengths, source, rows: Rows):
    return _sample(logits[source], rows, request_keys(rows.identity), lengths[source], rows.forced)


def _insert(cache, part, source, slots):
    return insert_cache(cache, jax.tree.map(lambda x: x[source], part), slots)


class _Loop(NamedTuple):
    step: jax.Array
    cache: Any
    token: jax.Array
    position: jax.Array
    remaining: jax.Array
    forced: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


def _decode(model, steps: int, params, cache, rows: Rows):
    keys = request_keys(rows.identity)
    slots = rows.token.shape[0]

    def unfinished(loop: _Loop):
        return (loop.step < steps) & jnp.any(loop.remaining > 0)

    def advance(loop: _Loop):
        active = loop.remaining > 0
        # An idle slot writes at its start, which the next prefill overwrites.
        logits, cache = model.decode(params, loop.cache, loop.token, jnp.where(active, loop.position, 0))
        token, logprob = _sample(logits, rows, keys, loop.position + 1, loop.forced)
        token = jnp.where(active, token, loop.token)
        stopped = jnp.any(token[:, None] == rows.stop, axis=1)
        one = active.astype(jnp.int32)
        return _Loop(
            step=loop.step + 1,
            cache=cache,
            token=token,
            position=loop.position + one,
            remaining=jnp.where(stopped, 0, loop.remaining - one),
            forced=loop.forced - one,
            tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, token, loop.step, 0),
            logprobs=jax.lax.dynamic_update_index_in_dim(loop.logprobs, logprob, loop.step, 0),
        )

    nothing = (jnp.zeros((steps, slots), jnp.int32), jnp.zeros((steps, slots), jnp.float32))
    start = _Loop(jnp.int32(0), cache, rows.token, rows.position, rows.remaining, rows.forced, *nothing)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.cache, end.tokens, end.logprobs


def _decode_few(model, steps: int, params, cache, rows: Rows, slots):
    """`_decode` of the sequences in `slots` alone, distinct ones, whose `rows` are given."""
    part, tokens, logprobs = _decode(model, steps, params, jax.tree.map(lambda x: x[slots], cache), rows)
    return jax.tree.map(lambda x, new: x.at[slots].set(new, unique_indices=True), cache, part), tokens, logprobs
