"""Tokens per second of the rollout engines: python tools/bench_engine.py [--engine jax vllm] [--json PATH]

Measures at several numbers of concurrent requests, each level `--repeats` times after a warm-up, with the same
checkpoint (`--model`; the quick start's, if none is given) for every engine. Every request generates exactly
`--new-tokens` tokens, and a new one begins when one ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is what people look at

import jax
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from areal_jax.launch.roles import as_role
from areal_jax.models import Model, load_hf, to_hf
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import Engine, Request, Sampling
from areal_jax.rollout.factory import make_engine
from areal_jax.weights import Publisher

TOY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "toy")


async def measure(engine: Engine, name: str, vocabulary: int, concurrent: int, args: argparse.Namespace) -> dict:
    rng = np.random.default_rng(0)
    limits = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    sampling = Sampling(max_new_tokens=args.new_tokens, **limits)

    async def one_after_another(lane: int, count: int) -> None:
        for i in range(count):
            prompt = rng.integers(0, vocabulary, args.prompt_tokens).astype(np.int32)
            await engine.generate(Request(tokens=prompt, sampling=sampling, key=(args.seed, lane, i)))

    async def run(count: int) -> tuple[float, float]:
        before, start = engine.stats(), time.perf_counter()
        await asyncio.gather(*(one_after_another(lane, count) for lane in range(concurrent)))
        return engine.stats()["tokens_generated"] - before["tokens_generated"], time.perf_counter() - start

    await run(1)
    tokens, seconds = await run(1)
    count = max(1, round(args.seconds * tokens / seconds / (concurrent * args.new_tokens)))
    rates = []
    for _ in range(args.repeats):
        tokens, seconds = await run(count)
        rates.append(tokens / seconds)
    return {
        "mode": f"{name}_concurrent_{concurrent}",
        "engine": name,
        "concurrent": concurrent,
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "requests_per_repeat": count * concurrent,
    }


async def measure_engine(name: str, model: Model, params, args: argparse.Namespace) -> list[dict]:
    config = RolloutConfig(
        engine=name, slots=args.slots, max_length=args.max_length, steps_per_dispatch=args.steps, dtype=args.dtype,
        engine_args={"prefill_rows": args.prefill_rows} if name == "jax" else {},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as workdir, Publisher(workdir) as publisher:
        manifest = publisher.publish(0, to_hf(model, params, args.dtype))
        engine = make_engine(config, args.model, seed=args.seed, workdir=workdir)
        try:
            start = time.perf_counter()
            await engine.start(manifest)
            print(f"{name}: {args.slots} slots, start {time.perf_counter() - start:.1f} s")
            results = []
            for concurrent in args.concurrent:
                results.append(await measure(engine, name, model.config.vocab_size, concurrent, args))
                r = results[-1]
                rates = f"{r['tokens_per_second']:9.0f} tokens/s  ({r['lowest']:.0f} to {r['highest']:.0f})"
                print(f"{concurrent:4d} concurrent: {rates}", flush=True)
            stats = engine.stats()
            if "recompiles_after_warmup" in stats:
                print(f"recompiled after warm-up: {stats['recompiles_after_warmup']:.0f}")
            return [r | {"stats": stats} for r in results]
        finally:
            await engine.close()


async def main(args: argparse.Namespace) -> None:
    model, params = load_hf(args.model)
    print(f"{args.model}: {model.num_params():,} parameters, {os.cpu_count()} cores")
    results = [r for name in args.engine for r in await measure_engine(name, model, params, args)]
    if args.json:
        machine = {"machine": platform.node(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind}
        machine["load_1min"] = os.getloadavg()[0]
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([r | machine | {"settings": settings} for r in results], file, indent=1)


if __name__ == "__main__":
    as_role()  # measure what a run does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", choices=["jax", "vllm"], default=["jax"], help="one after the other")
    parser.add_argument("--model", default=TOY, help="checkpoint folder; default: the quick start's")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8, help="jax: decode steps per dispatch")
    parser.add_argument("--prefill-rows", type=int, default=8, help="jax")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one repeat, about")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default="", help="write the results there")
    asyncio.run(main(parser.parse_args()))
