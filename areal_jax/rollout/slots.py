"""The slot table of the embedded engine: which sequence runs where, how far it is, and when it is done. Plain numpy."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from areal_jax.rollout.engine import Completion, Request

MAX_STOP_TOKENS = 16


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way: the prompt and what has been sampled so far."""

    request: Request
    future: asyncio.Future  # of the Completion
    tokens: np.ndarray  # int32 [prompt + all that may come]
    logprobs: np.ndarray  # float32, likewise
    versions: np.ndarray  # int32, likewise
    length: int  # how many of these there are
    slot: int = -1

    @classmethod
    def begin(cls, request: Request, max_length: int, future: asyncio.Future) -> Sequence:
        """Raises `ValueError` for a request that can never be served."""
        tokens = np.asarray(request.tokens, np.int32)
        _check(request, tokens, max_length)
        limit = min(len(tokens) + request.sampling.max_new_tokens, max_length)
        columns = np.zeros(limit, np.int32), np.zeros(limit, np.float32), np.zeros(limit, np.int32)
        columns[0][: len(tokens)] = tokens
        return cls(request, future, *columns, length=len(tokens))

    def completion(self, finish_reason: str) -> Completion:
        """What was sampled."""
        new = slice(len(self.request.tokens), self.length)
        return Completion(
            tokens=self.tokens[new].copy(),
            logprobs=self.logprobs[new].copy(),
            versions=self.versions[new].copy(),
            finish_reason=finish_reason,
        )


class Rows(NamedTuple):
    """What the compiled programs know of each sequence; one row per slot."""

    token: np.ndarray  # int32 [S]: the last token, not yet in the cache
    position: np.ndarray  # int32 [S]: its index
    remaining: np.ndarray  # int32 [S]: tokens that may still be sampled; 0 for an idle slot
    forced: np.ndarray  # int32 [S]: of these, how many must not be a stop token
    temperature: np.ndarray  # float32 [S]
    top_k: np.ndarray  # int32 [S]
    top_p: np.ndarray  # float32 [S]
    stop: np.ndarray  # int32 [S, MAX_STOP_TOKENS], -1 for none
    identity: np.ndarray  # int32 [S, 3]: run seed, group, sample

    @classmethod
    def idle(cls, n: int) -> Rows:
        """`n` rows that nothing is sampled for."""
        zeros = functools.partial(np.zeros, n, np.int32)
        ones = functools.partial(np.ones, n, np.float32)
        stop = np.full((n, MAX_STOP_TOKENS), -1, np.int32)
        return cls(zeros(), zeros(), zeros(), zeros(), ones(), zeros(), ones(), stop, np.zeros((n, 3), np.int32))

    def take(self, indices) -> Rows:
        """Copies of some rows."""
        return Rows(*(column[indices] for column in self))


class Slots:
    """The running sequences and their rows."""

    def __init__(self, count: int):
        self.count = count
        self.rows = Rows.idle(count)
        self.running: dict[int, Sequence] = {}
        self._free = list(reversed(range(count)))

    @property
    def free(self) -> int:
        """How many more sequences fit."""
        return len(self._free)

    def place(self, sequence: Sequence) -> None:
        """Gives `sequence` a free slot; its first token is still to be sampled."""
        slot = sequence.slot = self._free.pop()
        self.running[slot] = sequence
        sampling, rows = sequence.request.sampling, self.rows
        rows.position[slot] = sequence.length - 1
        rows.remaining[slot] = len(sequence.tokens) - sequence.length
        rows.forced[slot] = sampling.min_new_tokens
        rows.temperature[slot] = sampling.temperature
        rows.top_k[slot] = sampling.top_k
        rows.top_p[slot] = sampling.top_p
        rows.stop[slot] = -1
        rows.stop[slot, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        rows.identity[slot] = np.asarray(sequence.request.key, np.int64).astype(np.int32)  # keeps the low bits

    def release(self, sequence: Sequence) -> None:
        """Frees the slot of `sequence`."""
        del self.running[sequence.slot]
        self.rows.remaining[sequence.slot] = 0
        self._free.append(sequence.slot)

    def reach(self, steps: int) -> int:
        """The length of cache that `steps` more tokens of every running sequence need."""
        rows = self.rows
        ends = np.where(rows.remaining > 0, rows.position + np.minimum(rows.remaining, steps), 0)
        return int(ends.max(initial=0))

    def accept(self, tokens, logprobs, version: int, chosen=True) -> tuple[np.ndarray, list[tuple[Sequence, str]]]:
        """Appends to each running sequence what was sampled for it, up to its stop token or its limit.

        Args:
          tokens, logprobs: int32 and float32 `[steps, S]`.
          version: of the weights that sampled them.
          chosen: bool `[S]`, the slots that they are for; all by default.

        Returns:
          How many tokens each slot took, `[S]`, and the finished sequences (their slots are free) with the reason.
        """
        rows = self.rows
        stops = (tokens[:, :, None] == rows.stop[None]).any(axis=2)
        until_stop = np.where(stops.any(axis=0), stops.argmax(axis=0) + 1, len(tokens) + 1)
        taken = np.minimum(np.minimum(until_stop, len(tokens)), np.where(chosen, rows.remaining, 0))
        stopped = until_stop <= taken
        last = tokens[np.maximum(taken - 1, 0), np.arange(self.count)]
        rows.token[:] = np.where(taken > 0, last, rows.token)
        rows.position[:] += taken
        rows.remaining[:] = np.where(stopped, 0, rows.remaining - taken)
        rows.forced[:] = np.maximum(rows.forced - taken, 0)
        finished = []
        for slot in np.flatnonzero(taken).tolist():
            sequence, n = self.running[slot], int(taken[slot])
            new = slice(sequence.length, sequence.length + n)
            sequence.tokens[new], sequence.logprobs[new] = tokens[:n, slot], logprobs[:n, slot]
            sequence.versions[new] = version
            sequence.length += n
            if not rows.remaining[slot]:
                self.release(sequence)
                finished.append((sequence, "stop" if stopped[slot] else "length"))
        return taken, finished


def _check(request: Request, tokens: np.ndarray, max_length: int) -> None:
    s = request.sampling
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"a request needs at least one token in one dimension, not shape {tokens.shape}")
    if len(tokens) >= max_length:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens leaves no room below rollout.max_length={max_length}; "
            "raise it, or filter long prompts with data.max_prompt_tokens"
        )
    if s.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {s.max_new_tokens}; it must be at least 1")
    if not 0 < s.top_p <= 1 or s.top_k < 0 or s.temperature < 0:
        raise ValueError(f"top_p={s.top_p}, top_k={s.top_k}, temperature={s.temperature} cannot be sampled with")
    if len(s.stop_token_ids) > MAX_STOP_TOKENS:
        raise ValueError(f"{len(s.stop_token_ids)} stop tokens are more than the {MAX_STOP_TOKENS} that fit")
