"""The embedded generation engine: continuous batching over fixed slots, in JAX, without a server.

One thread owns the arrays and does nothing but prefill and decode; requests and new weights reach it through an inbox
that it reads between dispatches, so an update interrupts generation at the next dispatch boundary. Reading and
converting a version's bytes happens outside of that thread, while it generates.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from areal_jax import weights
from areal_jax.models import Model, ModelConfig, ModelError, from_hf, unstack_layers
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import Completion, EngineDied, Request, WeightsRefused
from areal_jax.rollout.jax_programs import Programs, bucket
from areal_jax.rollout.slots import Sequence, Slots
from areal_jax.transport.messages import Manifest

# Reads one version: (parameters as the model wants them, seconds by name). Raises `WeightsRefused`.
Load = Callable[[Manifest], tuple[Any, dict[str, float]]]

_SHRINK_AFTER = 4  # dispatches that a shorter cache would have done for, before it is cut


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
      exact: give the cache one length and a decode one number of rows for all time; sums then have one order, and
        log-probs do not depend on company or schedule to the last bit. Short sequences pay for `max_length`.
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
        exact: bool = False,
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
            model, slots=slots, max_length=max_length, steps=steps_per_dispatch, prefill_rows=prefill_rows, dtype=dtype,
            exact=exact,
        )  # fmt: skip
        self._counts: Counter[str] = Counter()
        # Shared with the callers' threads, under the lock: what is still owed, and why nothing more will come.
        self._lock = threading.Lock()
        self._owed: set[asyncio.Future] = set()
        self._death: EngineDied | None = EngineDied("the engine has not been started; await start(manifest) first")
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The engine thread's own.
        self._thread: threading.Thread | None = None
        self._waiting: deque[Sequence] = deque()
        self._table = Slots(slots)
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
        sequence = Sequence.begin(request, self.max_length, asyncio.get_running_loop().create_future())
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
        return stats | {"running": float(len(self._table.running)), "waiting": float(len(self._waiting))}

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
                if self._update is not None and (self.interruptible or not self._table.running):
                    self._swap(self._update)
                if self._update is None:
                    self._admit()
                if self._table.running:
                    self._advance()
        except Exception as error:  # whatever it is, those who wait must hear of it
            death = EngineDied(f"the engine died: {type(error).__name__}: {error}")
            death.__cause__ = error
            self._die(death)

    def _read_inbox(self) -> None:
        """Runs what callers asked for; waits for it when there is nothing else to do."""
        idle = not self._table.running and not self._waiting and self._update is None
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return
            command()
            idle = False

    def _take(self, update: _Update) -> None:
        """Keeps `update` for the next boundary; a newer one replaces one that has not been loaded yet."""
        if update.version < self.version and (self._table.running or self._waiting):
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
        unfinished = list(self._table.running.values())
        self._counts["weight_updates"] += 1
        self._counts["sequences_interrupted"] += len(unfinished)
        middle = time.perf_counter()
        if self.kv_policy == "recompute" and unfinished:
            self._counts["tokens_recomputed"] += self._prefill(unfinished)
        self._set_paused(False)
        end = time.perf_counter()
        self._settle(update.future, update.timings | {"pause": end - start, "recompute": end - middle})

    def _admit(self) -> None:
        fresh = []
        while self._waiting and self._table.free:
            fresh.append(self._waiting.popleft())
            self._table.place(fresh[-1])
        if fresh:
            self._counts["tokens_prefilled"] += self._prefill(fresh)

    def _prefill(self, sequences: list[Sequence]) -> int:
        """Fills the caches of `sequences` (in their slots already) and samples one token for each.

        Returns the number of tokens that were run.
        """
        rows = self._programs.prefill_rows
        prompts: dict[int, dict[bytes, list[Sequence]]] = {}  # by width; equal ones, as a group has, are run once
        for sequence in sequences:
            same = prompts.setdefault(bucket(self._programs.widths, sequence.length), {})
            same.setdefault(sequence.tokens[: sequence.length].tobytes(), []).append(sequence)
        count = sum(sequence.length for same in prompts.values() for sequence, *_ in same.values())
        self._fit_cache(max(prompts))
        dispatched = [
            dispatch
            for width, same in sorted(prompts.items())
            for i in range(0, len(same), rows)
            for dispatch in self._prefill_few(list(same.values())[i : i + rows], width)
        ]
        tokens, logprobs = np.zeros((1, self.slots), np.int32), np.zeros((1, self.slots), np.float32)
        chosen = np.zeros(self.slots, bool)
        for slots, new, logprob in dispatched:
            n = len(slots)
            tokens[0, slots], logprobs[0, slots], chosen[slots] = np.asarray(new)[:n], np.asarray(logprob)[:n], True
        self._accept(tokens, logprobs, chosen)
        return count

    def _prefill_few(self, few: list[list[Sequence]], width: int):
        """Dispatches one prefill of `few` prompts, each for one or more sequences that begin with it.

        Yields slots, and their tokens and log-probs to come, of at most `prefill_rows` sequences at a time.
        """
        rows = self._programs.prefill_rows
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for i, (sequence, *_) in enumerate(few):
            tokens[i, : sequence.length], lengths[i] = sequence.tokens[: sequence.length], sequence.length
        part, logits = self._programs.prefill(self._params, tokens, lengths)
        places = np.array([(i, sequence.slot) for i, same in enumerate(few) for sequence in same], np.int32)
        for i in range(0, len(places), rows):
            n = len(places[i : i + rows])
            source, slots = np.zeros(rows, np.int32), np.full(rows, self.slots, np.int32)  # out of range: nowhere
            source[:n], slots[:n] = places[i : i + rows].T
            of_slots = self._table.rows.take(np.minimum(slots, self.slots - 1))
            new, logprobs = self._programs.first(logits, lengths, source, of_slots)
            self._cache = self._programs.insert(self._cache, part, source, slots)
            yield slots[:n], new, logprobs

    def _advance(self) -> None:
        self._fit_cache(0)
        self._cache, tokens, logprobs = self._programs.decode(self._params, self._cache, self._table.rows)
        taken = self._accept(np.asarray(tokens), np.asarray(logprobs))
        steps = int(taken.max(initial=0))
        self._counts["decode_steps"] += steps
        self._counts["idle_slot_steps"] += steps * self.slots - int(taken.sum())

    def _accept(self, tokens: np.ndarray, logprobs: np.ndarray, chosen=True) -> np.ndarray:
        taken, finished = self._table.accept(tokens, logprobs, self.version, chosen)
        self._counts["tokens_generated"] += int(taken.sum())
        self._counts["requests_finished"] += len(finished)
        for sequence, reason in finished:
            completion = sequence.completion(reason)
            if np.isfinite(completion.logprobs).all():
                self._settle(sequence.future, completion)
            else:
                text = f"log-probs are not finite under the weights of version {self.version}; has training diverged?"
                self._settle(sequence.future, FloatingPointError(text))
        return taken

    def _forget(self, sequence: Sequence) -> None:
        """The caller does not want it any more."""
        if self._table.running.get(sequence.slot) is sequence:
            self._table.release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        with self._lock:
            self._owed.discard(sequence.future)

    def _fit_cache(self, least: int) -> None:
        """Makes the cache as long as the next dispatch needs, and not much longer."""
        length = bucket(self._programs.lengths, max(least, self._table.reach(self._programs.steps)))
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
        self._table = Slots(self.slots)
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


def hf_loader(model: Model, dtype: Any, timeout: float, workdir: str | os.PathLike | None = None) -> Load:
    """A `Load` for versions that the trainer published: checked, mapped, copied to the default device as `dtype`."""

    def load(manifest: Manifest) -> tuple[Any, dict[str, float]]:
        start = time.perf_counter()
        try:
            with weights.open_version(manifest, workdir=workdir, timeout=timeout) as version:
                middle = time.perf_counter()
                params = jax.block_until_ready(unstack_layers(from_hf(model, version, jnp.dtype(dtype))))
        except (weights.WeightsRefused, ModelError, OSError) as error:
            raise WeightsRefused(f"version {manifest.version} was not loaded: {error}") from error
        return params, {"read": middle - start, "convert": time.perf_counter() - middle}

    return load


def make_jax_engine(config: RolloutConfig, model_path: str, workdir: str | os.PathLike | None = None) -> JaxEngine:
    """The engine for the checkpoint folder `model_path`, as the settings say; not started yet."""
    model = Model(ModelConfig.from_hf(model_path), compute_dtype=config.dtype)
    return JaxEngine(
        model,
        hf_loader(model, config.dtype, config.weights_timeout, workdir),
        slots=config.slots,
        max_length=config.max_length,
        steps_per_dispatch=config.steps_per_dispatch,
        kv_policy=config.kv_policy,
        interruptible=config.interruptible,
        dtype=config.dtype,
        exact=config.exact == "always",
        **config.engine_args,
    )
