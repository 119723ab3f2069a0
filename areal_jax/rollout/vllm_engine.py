"""The rollout engine for real work: vLLM, unmodified, as a library inside the rollout worker. vLLM 0.32 or later.

New weights reach requests in flight: generation pauses, every vLLM worker loads the version from shared memory, and the
same requests go on. vLLM stamps each token with the version that sampled it. Nothing here imports jax.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import difflib
import importlib.util
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from areal_jax.config import ConfigError
from areal_jax.rollout.engine import Completion, EngineDied, Request, Sampling, WeightsRefused
from areal_jax.transport.messages import Manifest
from areal_jax.weights import OpenVersion, open_version, same_layout

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
_WATCH_SECONDS = 0.5  # how often the engine's process is looked at
_GRACE_SECONDS = 1.0  # for vLLM to end by itself; its CPU build needs ten, and then is killed as well
# What the promises about log-probs, versions and weights rest on, or (a seed) each worker has its own of; not for
# `engine_args`.
_FIXED = (
    "model", "dtype", "seed", "max_model_len", "max_num_seqs", "logprobs_mode", "weight_transfer_config",
    "worker_extension_cls",
)  # fmt: skip


def check_args(engine_args: Mapping[str, Any], known: set[str]) -> None:
    """Raises `ConfigError` for engine arguments that a user may not set, or that are not `known` (if any are)."""
    if fixed := sorted(set(engine_args) & set(_FIXED)):
        raise ConfigError(f"rollout.engine_args may not set {', '.join(fixed)}: areal_jax sets these itself")
    for name in sorted(engine_args.keys() - known) if known else ():
        close = difflib.get_close_matches(name, known)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"rollout.engine_args: vLLM has no engine argument {name!r}{hint}")


def known_args() -> set[str]:
    """Names of the installed vLLM's engine arguments, from its source: importing it takes seconds. Empty without."""
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    try:
        source = (Path(next(iter(places or ()), "")) / "engine" / "arg_utils.py").read_text(encoding="utf-8")
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    except (OSError, SyntaxError):
        return set()
    fields = [field for node in classes if node.name in ("EngineArgs", "AsyncEngineArgs") for field in node.body]
    return {field.target.id for field in fields if isinstance(field, ast.AnnAssign)}


class VllmEngine:
    """An `Engine` (see `rollout.engine`) made of vLLM's AsyncLLM.

    Args:
      model: folder with the Hugging Face config; its weights, if any, are not read.
      slots: sequences generated at once; further requests wait here.
      max_length: tokens of a prompt and its continuation together.
      kv_policy: what happens on new weights to the caches of sequences in flight. "recompute": prefilled again. "keep":
        kept; the prefix cache is keyed by version, so that no later request reads an older version's entries.
      interruptible: False lets running sequences finish before new weights are loaded.
      dtype: of parameters, computation and cache.
      seed: of vLLM's own generator; must differ between the workers of a run. vLLM's samples depend on its schedule:
        only their distribution is reproducible.
      workdir: the run's folder; weights from other hosts need it.
      weights_timeout: seconds to wait for a version's bytes, and the longest that a load may take.
      engine_args: more of vLLM's engine arguments, by name (tensor_parallel_size, gpu_memory_utilization, ...).
    """

    def __init__(
        self,
        model: str,
        *,
        slots: int,
        max_length: int,
        kv_policy: str = "recompute",
        interruptible: bool = True,
        dtype: str = "float32",
        seed: int = 0,
        workdir: str | os.PathLike | None = None,
        weights_timeout: float = 120.0,
        engine_args: dict[str, Any] | None = None,
    ):
        if kv_policy not in ("recompute", "keep"):
            raise ValueError(f"kv_policy is {kv_policy!r}; use 'recompute' or 'keep'")
        check_args(engine_args or {}, known_args())
        self.version = -1
        self.slots, self.max_length = slots, max_length
        self.paused = False
        self.on_change: Callable[[], None] | None = None
        self._recompute, self._interruptible = kv_policy == "recompute", interruptible
        self._workdir, self._timeout = workdir and os.fspath(workdir), weights_timeout
        self._args = {
            "model": model,
            "dtype": dtype,
            "seed": seed % 2**31,
            "max_model_len": max_length,
            "max_num_seqs": slots,
            "config_format": "hf",  # as the trainer reads it: Mistral's folders have a config of another kind as well
            "load_format": "dummy",
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "worker_extension_cls": "areal_jax.rollout.vllm_receiver.WorkerExtension",
            **(engine_args or {}),
        }
        self._llm: AsyncLLM | None = None
        self._layout: Manifest | None = None  # the first version's: all must have the same tensors
        self._free = asyncio.Semaphore(slots)
        self._updating = asyncio.Lock()
        self._admitting = asyncio.Event()  # cleared while new requests must wait for an update
        self._admitting.set()
        self._running, self._generating, self._waiting, self._requests = 0, 0, 0, 0
        self._quiet = asyncio.Event()  # set while no request runs
        self._quiet.set()
        self._death: asyncio.Future[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._counters = dict.fromkeys(("tokens_generated", "tokens_prefilled", "tokens_recomputed", "requests"), 0)

    async def start(self, manifest: Manifest) -> None:
        """Start vLLM (20 seconds and more), load the first weights, and generate once to warm up.

        Refused weights (`WeightsRefused`) leave vLLM running: call it again with others.
        """
        if self._llm is None:
            self._death = asyncio.get_running_loop().create_future()
            self._llm = await asyncio.to_thread(_create, self._args)
            self._watch = asyncio.create_task(self._watch_engine())
            await self._unless_dead(self._llm.collective_rpc("areal_jax_drop_names"))
        await self._unless_dead(self._load(manifest))
        warm_up = Sampling(max_new_tokens=min(2, self.max_length - 1))
        await self.generate(Request(tokens=np.zeros(1, np.int32), sampling=warm_up, key=(0, 0, 0)))
        self._counters = dict.fromkeys(self._counters, 0)

    async def generate(self, request: Request) -> Completion:
        """Continue `request.tokens`; raises `ValueError` when they do not fit, `EngineDied` when vLLM is gone."""
        if len(request.tokens) + 1 > self.max_length:
            raise ValueError(f"a prompt of {len(request.tokens)} tokens leaves no room in max_length={self.max_length}")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            await self._admitting.wait()
            self._generating += 1
            self._quiet.clear()
            try:
                return await self._unless_dead(self._generate(request))
            finally:
                self._generating -= 1
                if not self._generating:
                    self._quiet.set()
        finally:
            self._running -= 1
            self._free.release()

    async def update_weights(self, manifest: Manifest) -> dict[str, float]:
        """Load a newer version while requests are in flight.

        Returns seconds for read (find, fetch, map), verify (checksums), open (the same in vLLM's workers), drain, pause
        (how long generation stood still) and, within it, load. Raises `WeightsRefused` with the old version in place.
        """
        async with self._updating:
            return await self._unless_dead(self._load(manifest))

    def stats(self) -> dict[str, float]:
        """Counts of tokens and requests that are done; raises `EngineDied`, so that a dead idle engine is noticed."""
        if self._death is not None and self._death.done():
            self._death.result()
        return {**self._counters, "running": self._running, "waiting": self._waiting}

    async def close(self) -> None:
        """End vLLM's processes; requests in flight raise `EngineDied`."""
        self._die(EngineDied("the engine was closed"))
        if self._watch is not None:
            self._watch.cancel()
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end that is now made as an error
            await asyncio.to_thread(llm.shutdown, _GRACE_SECONDS)
            llm.shutdown = lambda timeout=None: None  # it would run again, and fail, when the interpreter ends

    async def _generate(self, request: Request) -> Completion:
        from vllm.inputs import tokens_input

        self._requests += 1
        prompt = tokens_input(request.tokens.tolist(), cache_salt=self._salt())
        params = sampling_params(request.sampling, self.max_length - len(request.tokens))
        outputs = [output async for output in self._llm.generate(prompt, params, request_id=str(self._requests))]
        completion = _completion(outputs[-1].outputs[0])
        starts = np.flatnonzero(np.diff(completion.versions)) + 1
        self._counters["requests"] += 1
        self._counters["tokens_prefilled"] += len(request.tokens)
        self._counters["tokens_generated"] += len(completion.tokens)
        if self._recompute:
            self._counters["tokens_recomputed"] += int((len(request.tokens) + starts).sum())
        return completion

    def _salt(self) -> str:
        """Keys the prefix cache: only requests that were submitted under the same version share entries."""
        return f"version {self.version}"

    async def _load(self, manifest: Manifest) -> dict[str, float]:
        if self._layout is not None:
            same_layout(self._layout, manifest)
        with await asyncio.to_thread(open_version, manifest, workdir=self._workdir, timeout=self._timeout) as version:
            timings = dict(version.timings)
            with _timed(timings, "open"):
                await self._open_in_workers(manifest, version)
            try:
                with _timed(timings, "drain"):
                    if not self._interruptible:
                        self._admitting.clear()
                        await self._quiet.wait()
                with _timed(timings, "pause"):
                    self._admitting.clear()
                    self._set_paused(True)
                    timings["load"] = await self._swap(manifest.version)
            finally:
                self._set_paused(False)
                self._admitting.set()
        self._layout = self._layout or manifest
        return timings

    async def _swap(self, version: int) -> float:
        """Stop generation, load what the workers have opened, go on; returns the slowest rank's seconds for the load.

        An engine that fails half-way is dead.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            async with asyncio.timeout(self._timeout):
                await self._llm.pause_generation(mode="keep", clear_cache=self._recompute)
                await self._llm.start_weight_update()
                await self._llm.update_weights(WeightTransferUpdateRequest({"version": version}))
                await self._llm.finish_weight_update(str(version))
                ranks = await self._llm.collective_rpc("areal_jax_weight_timings")  # now: a busy engine answers late
                self.version = version
                await self._llm.resume_generation()
                return max(rank["load"] for rank in ranks)
        except BaseException as error:
            # Parameters may be half old, half new: nothing may be sampled from them.
            died = EngineDied(f"version {version} could not be loaded: {error!r}")
            self._die(died)
            if not isinstance(error, Exception):
                raise
            raise died from error

    def _set_paused(self, paused: bool) -> None:
        if paused != self.paused:
            self.paused = paused
            if self.on_change is not None:
                self.on_change()

    async def _open_in_workers(self, manifest: Manifest, version: OpenVersion) -> None:
        """Every worker process maps the version, and checks it where it is not the file that we have checked."""
        arguments = (msgspec.to_builtins(manifest), list(version.identity), self._workdir, self._timeout)
        for rank, refusal in enumerate(await self._llm.collective_rpc("areal_jax_open_weights", args=arguments)):
            if refusal:
                raise WeightsRefused(f"vLLM's worker {rank}: {refusal}")

    async def _watch_engine(self) -> None:
        """vLLM tells those who wait for tokens that its process died; this tells everybody else, soon."""
        while not self._llm.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        self._die(EngineDied("vLLM's engine process ended; its own messages say why"))

    def _die(self, error: EngineDied) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_exception(error)
            self._death.exception()  # read: nobody need be waiting

    async def _unless_dead(self, work: Awaitable[T]) -> T:
        """The result of `work`, or `EngineDied` as soon as the engine is known to be gone."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._death is None:
            raise EngineDied("the engine was not started")
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not self._death.done():
                return task.result()
            self._death.result()
        except EngineDeadError as error:
            died = EngineDied("vLLM's engine process ended; its own messages say why")
            self._die(died)
            raise died from error
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            elif not task.cancelled():
                task.exception()  # read: it may be dropped


def sampling_params(sampling: Sampling, room: int) -> SamplingParams:
    """Our settings in vLLM's terms; `room` is how many new tokens still fit. Stop tokens are ours alone."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    new = min(sampling.max_new_tokens, room)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=new,
        min_tokens=min(sampling.min_new_tokens, new),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    """vLLM's finished output; raises when a token has no log-prob or no version."""
    tokens = np.asarray(output.token_ids, np.int32)
    versions = np.full(len(tokens), -1, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    first = output.logprobs.start_indices  # of each position: the sampled token comes first
    logprobs = np.asarray(output.logprobs.logprobs, np.float32)[first]
    end = output.finish_reason
    if len(logprobs) != len(tokens) or (versions < 0).any() or end not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave {len(tokens)} tokens, {len(logprobs)} log-probs, {versions.tolist()}, {end!r}")
    return Completion(tokens=tokens, logprobs=logprobs, versions=versions, finish_reason=end)


def _create(args: dict[str, Any]) -> AsyncLLM:
    """Start vLLM with settings that also suit a machine without a GPU; raises `ValueError` for an unknown argument."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise a share of the whole machine's memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every worker binds to the same cores
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from areal_jax.rollout import vllm_weights

    os.environ[vllm_weights.OWNER] = str(os.getpid())
    vllm_weights.register()
    if current_platform.is_cpu():
        args = {"enforce_eager": True, **args}
        # One core is left to the other processes of the run; and threads that spin at barriers starve each other there.
        threads = (len(os.sched_getaffinity(0)) - 1) // args.get("tensor_parallel_size", 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    engine_args = AsyncEngineArgs(**args, weight_transfer_config=WeightTransferConfig(backend=vllm_weights.BACKEND))
    config = engine_args.create_engine_config()
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        head, possible = config.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
        if head not in possible:
            raise ConfigError(f"vLLM's CPU build has no attention for heads of {head}, only of {possible}")
        if config.parallel_config.world_size == 1 and engine_args.distributed_executor_backend is None:
            # As on a GPU: one process for scheduler and model. In two, as is vLLM's rule for CPUs, one of them spins
            # while it waits for the other.
            config.parallel_config.distributed_executor_backend = "uni"
    return AsyncLLM.from_vllm_config(config, disable_log_stats=engine_args.disable_log_stats)


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str):
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = time.perf_counter() - start
