"""Tokens per second of the embedded engine: python tools/bench_engine.py [--model DIR] [--json PATH]

Measures at several numbers of concurrent requests, each level `--repeats` times after a warm-up; without `--model`, a
Qwen2 network of the quick start's size with random weights (throughput does not depend on what they say). Every request
generates exactly `--new-tokens` tokens, and a new one begins when one ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time

import jax
import numpy as np

from areal_jax.models import Model, ModelConfig, load_hf
from areal_jax.rollout.engine import Request, Sampling
from areal_jax.rollout.jax_engine import JaxEngine
from areal_jax.transport.messages import Manifest

TOY = ModelConfig(
    family="qwen2", vocab_size=32, hidden_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24,
    mlp_size=288, tie_embeddings=True, qkv_bias=True, max_positions=256,
)  # fmt: skip


async def measure(engine: JaxEngine, concurrent: int, args: argparse.Namespace) -> dict:
    vocabulary = engine.vocabulary
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
        "mode": f"concurrent_{concurrent}",
        "concurrent": concurrent,
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "requests_per_repeat": count * concurrent,
    }


async def main(args: argparse.Namespace) -> None:
    if args.model:
        model, params = load_hf(args.model)
    else:
        model = Model(TOY)
        params = model.init(jax.random.key(args.seed))
    engine = JaxEngine(
        model, lambda manifest: (params, {}), slots=args.slots, max_length=args.max_length,
        steps_per_dispatch=args.steps, prefill_rows=args.prefill_rows,
    )  # fmt: skip
    engine.vocabulary = model.config.vocab_size
    start = time.perf_counter()
    await engine.start(Manifest(version=0, nbytes=0, tensors=[], path="", host=""))
    print(f"{model.num_params():,} parameters, {args.slots} slots, start {time.perf_counter() - start:.1f} s")
    results = []
    for concurrent in args.concurrent:
        results.append(await measure(engine, concurrent, args))
        r = results[-1]
        rates = f"{r['tokens_per_second']:9.0f} tokens/s  ({r['lowest']:.0f} to {r['highest']:.0f})"
        print(f"{concurrent:4d} concurrent: {rates}")
    stats = engine.stats()
    print(f"recompiled after warm-up: {stats['recompiles_after_warmup']:.0f}")
    await engine.close()
    if args.json:
        machine = {"machine": platform.node(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind}
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([r | machine | {"settings": settings, "stats": stats} for r in results], file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="checkpoint folder; default: random weights of the toy's size")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per dispatch")
    parser.add_argument("--prefill-rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one repeat, about")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default="", help="write the results there")
    asyncio.run(main(parser.parse_args()))
