"""How long an update takes, from "optimizer step done" to "worker generating with it": python tools/bench_weights.py

Publishes versions of a random network as the trainer does and loads them into a rollout engine that is generating, for
every size and transport asked for. Times are the medians over `--updates`, in milliseconds, after one that is not
counted:

  gather   bring the parameters together, and to the host
  convert  cast them, give them their Hugging Face names and layouts
  copy     write them for others to map, with checksums
  read     find the version, fetch it if it is on another host, map it
  verify   compare the checksums
  open     the same in vLLM's own workers
  load     put them into the engine's parameters
  pause    how long generation stood still; holds `load` for vLLM
  total    all of it

The transport "tcp" takes this machine for two hosts. The engine "none" only maps and copies: the baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is what people look at

import jax
import msgspec
import numpy as np

from areal_jax import models, weights
from areal_jax.rollout.engine import Request, Sampling

PARTS = ("gather", "convert", "copy", "read", "verify", "open", "load", "pause", "total")
# name: width, layers, heads, width of the MLP, vocabulary. "toy" is the quick start's; "0.5B" is Qwen2.5-0.5B.
SIZES = {
    "toy": (96, 2, 3, 256, 260),
    "10M": (256, 8, 4, 1024, 4096),
    "100M": (640, 12, 10, 2560, 32768),
    "0.5B": (896, 24, 14, 4864, 151936),
}
MAX_LENGTH = 512


class Mapped:
    """No engine at all: copies the tensors, as a baseline of what memory allows."""

    async def start(self, manifest) -> None:
        await self.update_weights(manifest)

    async def update_weights(self, manifest) -> dict[str, float]:
        with weights.open_version(manifest, workdir=self.workdir) as version:
            start = time.perf_counter()
            for _, array in version:
                array.copy()
            return version.timings | {"load": time.perf_counter() - start, "pause": 0.0}

    async def close(self) -> None:
        pass


def write_config(size: str, folder: str) -> None:
    width, layers, heads, mlp, vocabulary = SIZES[size]
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 7) if size == "0.5B" else heads,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu", eos_token_id=0, bos_token_id=0, torch_dtype="bfloat16",
    )  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(config))


def make_engine(name: str, folder: str, workdir: str, dtype: str, slots: int):
    if name == "none":
        engine = Mapped()
        engine.workdir = workdir
        return engine
    from areal_jax.rollout.config import RolloutConfig
    from areal_jax.rollout.factory import make_engine

    config = RolloutConfig(engine=name, slots=slots, max_length=MAX_LENGTH, dtype=dtype, max_new_tokens=MAX_LENGTH)
    return make_engine(config, folder, seed=0, workdir=workdir)


async def keep_busy(engine, vocabulary: int, lane: int) -> None:
    rng = np.random.default_rng(lane)
    for i in range(10**9):
        tokens = rng.integers(0, vocabulary, 16).astype(np.int32)
        await engine.generate(Request(tokens=tokens, sampling=Sampling(max_new_tokens=400), key=(0, lane, i)))


async def measure(engine_name: str, size: str, args: argparse.Namespace) -> AsyncIterator[dict]:
    """Medians over the updates, one transport after the other, of one engine and size."""
    folder = tempfile.mkdtemp(prefix="areal_jax-bench-")
    busy, engine = [], None
    try:
        write_config(size, folder)
        model = models.Model(models.ModelConfig.from_hf(folder))
        params = jax.block_until_ready(model.init(jax.random.key(0), args.param_dtype))
        versions = itertools.count()
        for transport in args.transports:
            with publisher_for(transport, folder) as publisher:

                def publish(publisher=publisher, transport=transport):
                    measured = {}
                    named = models.to_hf(model, params, args.dtype, timings=measured)
                    manifest = publisher.publish(next(versions), named, measured=measured)
                    away = {"host": f"not-{socket.gethostname()}"} if transport == "tcp" else {}
                    return msgspec.structs.replace(manifest, **away)

                if engine is None:
                    engine = make_engine(engine_name, folder, folder, args.dtype, args.requests)
                    await engine.start(await asyncio.to_thread(publish))
                    for lane in range(args.requests * (engine_name != "none")):
                        busy.append(asyncio.create_task(keep_busy(engine, model.config.vocab_size, lane)))
                rows = []
                for _ in range(args.updates + 1):
                    await asyncio.sleep(args.interval)
                    start = time.perf_counter()
                    manifest = await asyncio.to_thread(publish)
                    made = {part: publisher.timings[part] for part in ("gather", "convert", "copy")}
                    loaded = await engine.update_weights(manifest)
                    total = time.perf_counter() - start
                    if "convert" in loaded:  # the embedded engine's: it makes its parameters before it pauses
                        loaded["load"] = loaded.pop("convert")
                    rows.append(made | {"total": total} | loaded)
                    if dead := [task for task in busy if task.done()]:
                        dead[0].result()
            result = {"engine": engine_name, "size": size, "transport": transport, "dtype": args.dtype}
            result |= {"parameters": model.num_params(), "megabytes": publisher.timings["megabytes"]}
            for part in PARTS:
                values = [1000 * row[part] for row in rows[1:] if part in row]
                if values:
                    result |= {f"{part}_ms": statistics.median(values), f"{part}_ms_highest": max(values)}
            yield result
    finally:
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        if engine is not None:
            await engine.close()
        weights.cleanup(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def publisher_for(transport: str, folder: str):
    """For "tcp" the publisher has shared memory of its own, as another host would."""
    if transport != "tcp":
        with weights.Publisher(folder, transport=transport) as publisher:
            yield publisher
        return
    with (
        tempfile.TemporaryDirectory(prefix="areal_jax-bench-", dir="/dev/shm") as memory,
        weights.Publisher(folder, transport=transport, shared_memory=Path(memory)) as publisher,
    ):
        yield publisher


async def run(args: argparse.Namespace, machine: dict) -> list[dict]:
    results = []
    for size, engine in itertools.product(args.sizes, args.engines):
        async for result in measure(engine, size, args):
            cells = (result.get(f"{part}_ms") for part in PARTS)
            print(
                f"{engine:6s} {size:5s} {result['megabytes']:7.1f} {result['transport']:4s}"
                + "".join(f"{'':>9s}" if cell is None else f"{cell:9.1f}" for cell in cells),
                flush=True,
            )
            results.append(result | machine)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["toy", "10M", "100M"])
    parser.add_argument("--transports", nargs="+", choices=["shm", "tcp", "disk"], default=["shm", "tcp", "disk"])
    parser.add_argument("--engines", nargs="+", choices=["none", "jax", "vllm"], default=["none", "jax", "vllm"])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--interval", type=float, default=0.3, help="seconds between updates")
    parser.add_argument("--requests", type=int, default=8, help="sequences in flight")
    parser.add_argument("--dtype", default="float32", help="of what is published, and of the engine")
    parser.add_argument("--param-dtype", default="float32", help="of the trainer's parameters")
    parser.add_argument("--json", default="", help="write the results there")
    args = parser.parse_args()
    machine = {"machine": platform.node(), "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    print(f"{machine['machine']}, {machine['cores']} cores, {args.requests} requests in flight, {args.dtype}; ms")
    print(f"{'engine':6s} {'size':5s} {'MB':>7s} {'via':4s}" + "".join(f"{part:>9s}" for part in PARTS))
    results = asyncio.run(run(args, machine))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
