"""The embedded generation engine: continuous batching over fixed slots, in JAX, without a server.

One thread owns the arrays and does nothing but prefill and decode; requests and new weights reach it through an inbox that
it reads between dispatches, so an update interrupts generation at the next dispatch boundary. Reading and converting
a version's bytes happens outside of that thread, while it generates.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from areal_jax.rollout.engine import Completion, EngineDied, Request, WeightsRefused
from areal_jax.rollout.jax_programs import MAX_STOP_TOKENS, Programs, Rows, bucket
from areal_jax.transport.messages import Manifest

# Reads one version: (parameters as the model wants them, seconds by name). Raises `WeightsRefused`.
Load = Callable[[Manifest], tuple[Any, dict[str, float]]]

_SHRINK_AFTER = 4  # dispatches that a shorter cache would have done for, before it is cut


@dataclasses.dataclass(eq=False)
class _Sequence:
    request: Request
    future: asyncio.Future
    tokens: np.ndarray  # int32 [prompt + all that may come]
    logprobs: np.ndarray  # float32, likewise
    versions: np.ndarray  # int32, likewise
    length: int  # how many of these there are
    slot: int = -1

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    def completion(self, finish_reason: str) -> Completion:
        new = slice(self.prompt_length, self.length)
        return Completion(
            tokens=self.tokens[new].copy(),
            logprobs=self.logprobs[new].copy(),
            versions=self.versions[new].copy(),
            finish_reason=finish_reason,
        )


@dataclasses.dataclass
class _Update:
    version: int
    params: Any
    timings: dict[str, float]
    future: asyncio.Future


class JaxEngine:
    """Generates with `model` (see `Programs` for what it needs) under weights that `load` reads.

    Tokens do not depend on slots, company, order, or dispatch length, only on the weights, the request and its key.

    Args:
      model: the network, without parameters.
      load: reads one version; runs in a thread of its own.
      slots: sequences that run at once; further requests wait.
      max_length: prompt and new tokens together.
      steps_per_dispatch: decode steps between two looks at the inbox.
      prefill_rows: prompts per prefill.
      kv_policy: on new weights, "recompute" the caches of unfinished sequences, or "keep" them.
      interruptible: False finishes the running sequences (no new ones begin) before new weights are taken.
      dtype: of the cache.
    """

    def __init__(
        self,
        model,
        load: Load,
        *,
        slots: int,
        max_length: int,
        steps_per_dispatch: int = 8,
        prefill_rows: int = 8,
        kv_policy: str = "recompute",
        interruptible: bool = True,
        dtype: Any = "float32",
    ):
        if kv_policy not in ("recompute", "keep"):
            raise ValueError(f"kv_policy is {kv_policy!r}; it must be 'recompute' or 'keep'")
        for name, value, least in (
            ("slots", slots, 1),
            ("max_length", max_length, 2),
            ("steps_per_dispatch", steps_per_dispatch, 1),
            ("prefill_rows", prefill_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.version = -1
        self.slots, self.max_length = slots, max_length
        self.kv_policy, self.interruptible = kv_policy, interruptible
        self.paused = False
        self.on_change: Callable[[], None] | None = None
        self._load = load
        self._programs = Programs(
            model, slots=slots, max_length=max_length, steps=steps_per_dispatch, prefill_rows=prefill_rows, dtype=dtype
        )
        self._counts: Counter[str] = Counter()
        # Shared with the callers' threads, under the lock: what is still owed, and why nothing more will come.
        self._lock = threading.Lock()
        self._owed: set[asyncio.Future] = set()
        self._death: EngineDied | None = EngineDied("the engine has not been started; await start(manifest) first")
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The engine thread's own.
        self._thread: threading.Thread | None = None
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._free = list(reversed(range(slots)))
        self._rows = Rows.idle(slots)
        self._update: _Update | None = None
        self._settled: list[tuple[asyncio.Future, Any]] = []
        self._params: Any = None
        self._cache: Any = None
        self._cache_length = 0
        self._short_for = 0

    # --- What callers use, on any event loop -----------------------------------------------------------------------

    async def start(self, manifest: Manifest) -> None:
        """Load the first weights and compile everything; raises what `load` raises."""
        params, _ = await asyncio.to_thread(self._load, manifest)
        future = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(target=self._run, args=(params, future), name="jax-engine", daemon=True)
        self.version = manifest.version
        with self._lock:
            self._owed.add(future)
            self._death = None
        self._thread.start()
        await future

    async def generate(self, request: Request) -> Completion:
        """The continuation of `request`; raises `ValueError` for a request that can never fit."""
        tokens = np.asarray(request.tokens, np.int32)
        _check(request, tokens, self.max_length)
        length, limit = len(tokens), min(len(tokens) + request.sampling.max_new_tokens, self.max_length)
        columns = np.zeros(limit, np.int32), np.zeros(limit, np.float32), np.zeros(limit, np.int32)
        columns[0][:length] = tokens
        sequence = _Sequence(request, asyncio.get_running_loop().create_future(), *columns, length)
        self._post(sequence.future, lambda: self._waiting.append(sequence))
        try:
            return await sequence.future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._forget(sequence))
            raise

    async def update_weights(self, manifest: Manifest) -> dict[str, float]:
        """Take a new version at the next dispatch boundary; see `Engine`."""
        with self._lock:
            if self._death is not None:
                raise self._death
        params, timings = await asyncio.to_thread(self._load, manifest)
        future = asyncio.get_running_loop().create_future()
        self._post(future, lambda: self._take(_Update(manifest.version, params, timings, future)))
        return await future

    def stats(self) -> dict[str, float]:
        """Cumulative counts since the start, and the momentary `running` and `waiting`."""
        names = (
            "tokens_generated", "tokens_prefilled", "tokens_recomputed", "requests_finished", "weight_updates",
            "sequences_interrupted", "decode_steps", "idle_slot_steps",
        )  # fmt: skip
        stats = {name: float(self._counts[name]) for name in names}
        stats["recompiles_after_warmup"] = float(self._programs.recompiles()) if self._thread else 0.0
        return stats | {"running": float(len(self._running)), "waiting": float(len(self._waiting))}

    async def close(self) -> None:
        """End the thread; what is in flight raises `EngineDied`."""
        if self._thread is not None:
            self._inbox.put(lambda: self._die(EngineDied("the engine was closed")))
            await asyncio.to_thread(self._thread.join)

    def _post(self, future: asyncio.Future, command: Callable[[], None]) -> None:
        with self._lock:
            if self._death is not None:
                raise self._death
            self._owed.add(future)
            self._inbox.put(command)

    # --- The engine thread -----------------------------------------------------------------------------------------

    def _run(self, params, started: asyncio.Future) -> None:
        try:
            self._params = params
            self._programs.warm_up(params)
            self._settle(started, None)
            while self._death is None:
                self._flush()
                self._read_inbox()
                if self._update is not None and (self.interruptible or not self._running):
                    self._swap(self._update)
                if self._update is None:
                    self._admit()
                if self._running:
                    self._advance()
        except Exception as error:  # whatever it is, those who wait must hear of it
            death = EngineDied(f"the engine died: {type(error).__name__}: {error}")
            death.__cause__ = error
            self._die(death)

    def _read_inbox(self) -> None:
        """Runs what callers asked for; waits for it when there is nothing else to do."""
        idle = not self._running and not self._waiting and self._update is None
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return
            command()
            idle = False

    def _take(self, update: _Update) -> None:
        """Keeps `update` for the next boundary; a newer one replaces one that has not been loaded yet."""
        if update.version < self.version and (self._running or self._waiting):
            text = f"version {update.version} is older than {self.version}, and there are unfinished sequences of that"
            self._settle(update.future, WeightsRefused(text))
            return
        if self._update is not None:
            text = f"version {self._update.version} was overtaken by version {update.version}"
            self._settle(self._update.future, WeightsRefused(text))
        self._update = update

    def _swap(self, update: _Update) -> None:
        start = time.perf_counter()
        self._set_paused(True)
        self._params, self.version, self._update = update.params, update.version, None
        unfinished = list(self._running.values())
        self._counts["weight_updates"] += 1
        self._counts["sequences_interrupted"] += len(unfinished)
        middle = time.perf_counter()
        if self.kv_policy == "recompute" and unfinished:
            self._counts["tokens_recomputed"] += sum(s.length for s in unfinished)
            self._prefill(unfinished)
        self._set_paused(False)
        end = time.perf_counter()
        self._settle(update.future, update.timings | {"pause": end - start, "recompute": end - middle})

    def _admit(self) -> None:
        fresh = []
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running[sequence.slot] = sequence
            self._counts["tokens_prefilled"] += sequence.length
            sampling, slot, rows = sequence.request.sampling, sequence.slot, self._rows
            rows.remaining[slot] = len(sequence.tokens) - sequence.length
            rows.forced[slot] = sampling.min_new_tokens
            rows.temperature[slot] = sampling.temperature
            rows.top_k[slot] = sampling.top_k
            rows.top_p[slot] = sampling.top_p
            rows.stop[slot] = -1
            rows.stop[slot, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
            rows.identity[slot] = np.asarray(sequence.request.key, np.int64).astype(np.int32)  # keeps the low bits
            fresh.append(sequence)
        if fresh:
            self._prefill(fresh)

    def _prefill(self, sequences: Sequence[_Sequence]) -> None:
        """Fills the caches of `sequences` (in their slots already) and samples one token for each."""
        widths = {sequence.slot: bucket(self._programs.lengths, sequence.length) for sequence in sequences}
        self._fit_cache(max(widths.values()))
        results = []
        for width in sorted(set(widths.values())):
            same = [sequence for sequence in sequences if widths[sequence.slot] == width]
            for few in _chunks(same, self._programs.prefill_rows):
                tokens = np.zeros((self._programs.prefill_rows, width), np.int32)
                lengths = np.zeros(self._programs.prefill_rows, np.int32)
                slots = np.full(self._programs.prefill_rows, self.slots, np.int32)
                for i, sequence in enumerate(few):
                    tokens[i, : sequence.length] = sequence.tokens[: sequence.length]
                    lengths[i], slots[i] = sequence.length, sequence.slot
                rows = self._rows.take(np.minimum(slots, self.slots - 1))
                part, new, logprobs = self._programs.prefill(self._params, tokens, lengths, rows)
                self._cache = self._programs.insert(self._cache, part, slots)
                results.append((slots, new, logprobs))
        tokens, logprobs = np.zeros((1, self.slots), np.int32), np.zeros((1, self.slots), np.float32)
        chosen = np.zeros(self.slots, bool)
        for slots, new, logprob in results:
            real = slots < self.slots
            tokens[0, slots[real]], logprobs[0, slots[real]] = np.asarray(new)[real], np.asarray(logprob)[real]
            chosen[slots[real]] = True
        self._accept(tokens, logprobs, chosen)

    def _advance(self) -> None:
        self._fit_cache(0)
        self._cache, tokens, logprobs = self._programs.decode(self._params, self._cache, self._rows)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        self._accept(tokens, logprobs, np.ones(self.slots, bool))

    def _accept(self, tokens: np.ndarray, logprobs: np.ndarray, chosen: np.ndarray) -> None:
        """Appends to each running sequence what it sampled, `[steps, slots]`, up to its stop token or its limit."""
        rows = self._rows
        stops = (tokens[:, :, None] == rows.stop[None]).any(axis=2)
        until_stop = np.where(stops.any(axis=0), stops.argmax(axis=0) + 1, len(tokens) + 1)
        taken = np.minimum(np.minimum(until_stop, len(tokens)), np.where(chosen, rows.remaining, 0))
        stopped = (until_stop <= taken) & (taken > 0)
        last = tokens[np.maximum(taken - 1, 0), np.arange(self.slots)]
        rows.token[:] = np.where(taken > 0, last, rows.token)
        rows.remaining[:] = np.where(stopped, 0, rows.remaining - taken)
        np.maximum(rows.forced - taken, 0, out=rows.forced)
        steps = int(taken.max(initial=0))
        self._counts["tokens_generated"] += int(taken.sum())
        if chosen.all():
            self._counts["decode_steps"] += steps
            self._counts["idle_slot_steps"] += steps * self.slots - int(taken.sum())
        for slot, sequence in list(self._running.items()):
            if n := int(taken[slot]):
                new = slice(sequence.length, sequence.length + n)
                sequence.tokens[new], sequence.logprobs[new] = tokens[:n, slot], logprobs[:n, slot]
                sequence.versions[new] = self.version
                sequence.length += n
                rows.position[slot] = sequence.length - 1
                if rows.remaining[slot] == 0:
                    self._finish(sequence, "stop" if stopped[slot] else "length")

    def _finish(self, sequence: _Sequence, reason: str) -> None:
        self._release(sequence)
        self._counts["requests_finished"] += 1
        completion = sequence.completion(reason)
        if np.isfinite(completion.logprobs).all():
            self._settle(sequence.future, completion)
        else:
            text = f"log-probs are not finite under the weights of version {self.version}; has training diverged?"
            self._settle(sequence.future, FloatingPointError(text))

    def _release(self, sequence: _Sequence) -> None:
        del self._running[sequence.slot]
        self._rows.remaining[sequence.slot] = 0
        self._free.append(sequence.slot)

    def _forget(self, sequence: _Sequence) -> None:
        """The caller does not want it any more."""
        if self._running.get(sequence.slot) is sequence:
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        with self._lock:
            self._owed.discard(sequence.future)

    def _fit_cache(self, least: int) -> None:
        """Makes the cache as long as the next dispatch needs, and not much longer."""
        rows = self._rows
        reach = np.where(rows.remaining > 0, rows.position + np.minimum(rows.remaining, self._programs.steps), 0)
        length = bucket(self._programs.lengths, max(least, int(reach.max(initial=0))))
        self._short_for = self._short_for + 1 if length < self._cache_length else 0
        if self._cache is None:
            self._cache = self._programs.new_cache(length)
        elif length > self._cache_length or self._short_for >= _SHRINK_AFTER:
            self._cache = self._programs.resize(self._cache, length)
        else:
            return
        self._cache_length, self._short_for = length, 0

    def _set_paused(self, paused: bool) -> None:
        self.paused = paused
        if self.on_change is not None:
            self.on_change()

    def _die(self, death: EngineDied) -> None:
        with self._lock:
            self._death = death
            owed = list(self._owed)
        for future in owed:
            self._settle(future, death)
        self._flush()
        self._params = self._cache = None
        self._running.clear()
        self._waiting.clear()

    def _settle(self, future: asyncio.Future, result: Any) -> None:
        self._settled.append((future, result))

    def _flush(self) -> None:
        """Hands finished work to the event loops of those who wait for it, one call each."""
        settled, self._settled = self._settled, []
        with self._lock:
            self._owed.difference_update(future for future, _ in settled)
        for loop in {future.get_loop() for future, _ in settled}:
            mine = [pair for pair in settled if pair[0].get_loop() is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set_results, mine)


def _set_results(settled: list[tuple[asyncio.Future, Any]]) -> None:
    for future, result in settled:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _chunks(items: Sequence[_Sequence], size: int) -> Iterable[Sequence[_Sequence]]:
    return (items[i : i + size] for i in range(0, len(items), size))


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


def convert_with(read: Callable[[Manifest], Iterable[tuple[str, np.ndarray]]], convert: Callable[[dict], Any]) -> Load:
    """A `Load` that reads named tensors with `read`, and turns them into parameters on the device with `convert`.

    Any error of either becomes `WeightsRefused`: the engine then stays on the weights that it has.
    """

    def load(manifest: Manifest) -> tuple[Any, dict[str, float]]:
        start = time.perf_counter()
        try:
            named = dict(read(manifest))
            middle = time.perf_counter()
            params = jax.block_until_ready(jax.device_put(convert(named)))
        except Exception as error:
            raise WeightsRefused(f"version {manifest.version}: {type(error).__name__}: {error}") from error
        end = time.perf_counter()
        return params, {"read": middle - start, "convert": end - middle}

    return load
