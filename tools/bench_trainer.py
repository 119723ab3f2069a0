"""Speed of a full training step: python tools/bench_trainer.py --size 0.5B [--baseline torch] [--json PATH]

Forward, backward and update of the trainer's own code (decoupled PPO, fused proximal log-probs, packed rows) on a
model of a named size with random weights, for a chosen mix of sequence lengths. Reports tokens per second (padding does
not count), model FLOP utilisation, compile time and peak memory. `--baseline torch` does the same step on the same
sequences with PyTorch and `transformers`, in the same run and on the same device.

MFU is given twice: by the formula of `areal_jax/trainer/flops.py`, which counts half of attention's square, as it is
causal, and by the one that most published figures have, which counts all of it; in both a packed row is its sequences.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from areal_jax.launch.roles import as_role
from areal_jax.models import REMAT, Model, ModelConfig
from areal_jax.trainer import flops, learner, packing
from areal_jax.trainer.batch import TrainBatch
from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.packing import Sample
from areal_jax.trainer.steps import CompileCounter

_QWEN2 = {"family": "qwen2", "qkv_bias": True}
SIZES = {
    "tiny": {**_QWEN2, "vocab_size": 260, "hidden_size": 96, "num_layers": 2, "num_heads": 3, "num_kv_heads": 3,
             "head_dim": 32, "mlp_size": 256, "tie_embeddings": True},
    "small": {**_QWEN2, "vocab_size": 8192, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
              "head_dim": 64, "mlp_size": 1024, "tie_embeddings": True},
    "0.5B": {**_QWEN2, "vocab_size": 151936, "hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2,
             "head_dim": 64, "mlp_size": 4864, "tie_embeddings": True},
    "0.6B": {"family": "qwen3", "qk_norm": True, "vocab_size": 151936, "hidden_size": 1024, "num_layers": 28,
             "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "mlp_size": 3072, "tie_embeddings": True},
    "1.5B": {**_QWEN2, "vocab_size": 151936, "hidden_size": 1536, "num_layers": 28, "num_heads": 12, "num_kv_heads": 2,
             "head_dim": 128, "mlp_size": 8960, "tie_embeddings": True},
    "7B": {**_QWEN2, "vocab_size": 152064, "hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4,
           "head_dim": 128, "mlp_size": 18944},
    "30B-A3B": {"family": "qwen3_moe", "qk_norm": True, "vocab_size": 151936, "hidden_size": 2048, "num_layers": 48,
                "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "mlp_size": 6144, "num_experts": 128,
                "experts_per_token": 8, "expert_mlp_size": 768},
}  # fmt: skip


def lengths_of(mix: str, total: int, longest: int, seed: int = 0) -> np.ndarray:
    """Sequence lengths that add up to about `total` tokens: "full", "fixed:N" or "uniform:LOW:HIGH"."""
    kind, *numbers = mix.split(":")
    bounds = {"full": lambda: (longest, longest), "fixed": lambda n: (int(n), int(n))}
    low, high = bounds.get(kind, lambda a, b: (int(a), int(b)))(*numbers)
    if not 2 <= low <= high <= longest:
        raise SystemExit(f"--lengths {mix}: must lie between 2 and --row-length {longest}")
    rng, lengths = np.random.default_rng(seed), []
    while not lengths or sum(lengths) + (low + high) // 2 <= total:
        lengths.append(int(rng.integers(low, high + 1)))
    return np.array(lengths)


def lengths_that_fit(args: argparse.Namespace) -> np.ndarray:
    """As many sequences of the mix as packing gets into the micro-batches of a step: none is half empty."""
    rows, limit = args.rows * args.micro_batches, packing.max_segments(settings_of(args))
    lengths = lengths_of(args.lengths, rows * args.row_length, args.row_length)
    if args.packing == "fixed":
        return lengths[:rows]

    def too_many(n):
        return len(packing.allocate(lengths[:n], args.row_length, max_items=limit)) > rows

    return lengths[: bisect.bisect_left(range(1, len(lengths) + 1), True, key=too_many)]


def samples_of(lengths: np.ndarray, vocab: int) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [
        Sample(
            tokens=rng.integers(0, vocab, n).astype(np.int32),
            mask=np.arange(n) >= n // 4,
            behavior_logprobs=np.full(n, -np.log(vocab), np.float32),
            versions=np.zeros(n, np.int32),
            advantages=float(rng.normal()),
        )
        for n in lengths
    ]


def settings_of(args: argparse.Namespace) -> TrainerConfig:
    return TrainerConfig(
        proximal="fused", rows=args.rows, row_length=args.row_length, packing=args.packing,
        fixed_sequences=args.rows, compute_dtype=args.dtype, remat=args.remat, attention=args.attention,
        layers=args.layers, max_segments=args.max_segments,
        data_parallel=args.data, fsdp=args.fsdp, tensor=args.tensor, learning_rate=1e-6, warmup_steps=1,
    )  # fmt: skip


def timed(step, warm_up: int, repeats: int) -> list[float]:
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_jax(args: argparse.Namespace, config: ModelConfig, samples: list[Sample]) -> dict:
    settings = settings_of(args)
    mesh = learner.mesh_of(settings)
    model = Model(
        config, mesh=mesh, compute_dtype=args.dtype, attention=args.attention, remat=args.remat,
        layers=args.layers, max_segments=learner.max_segments(settings),
    )  # fmt: skip
    params = model.init(jax.random.key(0), settings.param_dtype)
    one = learner.Learner(model, params, settings, mesh=mesh, objective=learner.make_objective(settings))
    del params
    start = time.perf_counter()
    one.warm_up()
    compile_seconds = time.perf_counter() - start
    batch = TrainBatch(0, samples, np.arange(len(samples), dtype=np.int32), {})
    compiles = CompileCounter()
    pending = one.step(batch)

    def step():  # as the trainer does: the report of the last step is read while this one is computed, and waited for
        nonlocal pending
        last, pending = pending, one.step(dataclasses.replace(batch, version=one.version))
        last.report()
        jax.block_until_ready(one.state.version)

    seconds = timed(step, args.warm_up, args.repeats)
    pending.report()
    packed = pending.packed[0]
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "mode": "areal_jax",
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "recompiles": compiles.count,
        "fill": packed.fill,
        "micro_batches": len(packed),
        "peak_memory_bytes": stats.get("peak_bytes_in_use")
        or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory_is": "of the device" if stats else "of the process",
        "software": f"jax {jax.__version__}",
    }


def measure_torch(args: argparse.Namespace, config: ModelConfig, samples: list[Sample]) -> dict:
    """The same step in PyTorch: padded rows, sorted by length so that little is padded, SDPA attention, fused AdamW."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf = transformers.AutoConfig.for_model(**{k: v for k, v in config.to_hf().items() if k != "architectures"})
    net = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa").to(device).float()
    if args.remat != "none":
        net.gradient_checkpointing_enable()
    net.train()
    options = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.05}
    optimizer = torch.optim.AdamW(net.parameters(), fused=device == "cuda", **options)
    low = torch.bfloat16 if args.dtype == "bfloat16" else None
    micros, budget = [[]], (args.baseline_rows or args.rows) * args.row_length
    for sample in sorted(samples, key=lambda s: -len(s.tokens)):
        longest = len((micros[-1] or [sample])[0].tokens)
        if longest * (len(micros[-1]) + 1) > budget:
            micros.append([])
        micros[-1].append(sample)
    total = sum(int(s.mask.sum()) for s in samples)

    def tensors(micro):
        width = len(micro[0].tokens)
        pad = lambda values, n: np.pad(values, (0, width - n))  # noqa: E731
        stack = lambda f: torch.tensor(np.stack([pad(f(s), len(s.tokens)) for s in micro]), device=device)  # noqa: E731
        advantages = stack(lambda s: np.full(len(s.tokens), s.advantages, np.float32))
        attended = stack(lambda s: np.ones(len(s.tokens), np.int64))
        tokens = stack(lambda s: s.tokens.astype(np.int64))
        return tokens, attended, stack(lambda s: s.mask), stack(lambda s: s.behavior_logprobs), advantages

    def step():
        for micro in micros:
            tokens, attended, mask, behavior, advantages = tensors(micro)
            with torch.autocast(device, low, enabled=low is not None):
                logits = net(input_ids=tokens, attention_mask=attended, use_cache=False).logits[:, :-1]
            chosen = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
            ratio = torch.exp(chosen - chosen.detach())
            weight = torch.exp(chosen.detach() - behavior[:, 1:])
            a = advantages[:, 1:]
            loss = weight * torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            (torch.where(mask[:, 1:], loss, 0.0).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    seconds = timed(step, args.warm_up, args.repeats)
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    positions = sum(len(m) * len(m[0].tokens) for m in micros)
    return {
        "mode": "torch",
        "seconds": seconds,
        "compile_seconds": first,
        "fill": sum(len(s.tokens) for s in samples) / positions,
        "micro_batches": len(micros),
        "peak_memory_bytes": memory,
        "memory_is": "of the device" if device == "cuda" else "of the process",
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}, SDPA, {device}",
    }


def peak_flops(given: float) -> tuple[float, str]:
    """The FLOP/s that MFU is a share of: given, known for the GPU, or measured with a large product on a CPU."""
    if given:
        return given * 1e12 * jax.device_count(), "given"
    name = jax.devices()[0].device_kind
    if known := flops.peak_of(name):
        return known[1] * jax.device_count(), f"data sheet of {known[0]}, 16 bit, dense"
    n = 2048
    x = jax.numpy.ones((n, n), jax.numpy.float32)
    product = jax.jit(lambda a: a @ a)
    seconds = timed(lambda: product(x).block_until_ready(), 2, 5)
    return 2 * n**3 / min(seconds), f"measured: float32 product of {n} x {n}"


def machine() -> str:
    name = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {name}, {os.cpu_count()} CPU cores, {platform.machine()}"


def measure(args: argparse.Namespace, which: str) -> dict:
    config = ModelConfig(**SIZES[args.size])
    lengths = lengths_that_fit(args)
    samples = samples_of(lengths, config.vocab_size)
    found = (measure_jax if which == "areal_jax" else measure_torch)(args, config, samples)
    gc.collect()
    seconds = statistics.median(found["seconds"])
    causal, full = (flops.model_flops(config, lengths, causal=x) for x in (True, False))
    found |= {
        "size": args.size,
        "parameters": Model(config).num_params(),
        "tokens": int(lengths.sum()),
        "sequences": len(lengths),
        "lengths": args.lengths,
        "rows": args.rows,
        "row_length": args.row_length,
        "dtype": args.dtype,
        "remat": args.remat,
        "seconds_per_step": seconds,
        "tokens_per_second": float(lengths.sum()) / seconds,
        "flops_per_step": causal,
        "flops_per_step_full_attention": full,
        "machine": machine(),
    }
    return found


def in_own_process(arguments: list[str], which: str) -> dict:
    """Measures in a fresh process, so that neither side finds the other's memory taken."""
    command = [sys.executable, os.path.abspath(__file__), *arguments, "--only", which]
    preallocate = {"XLA_PYTHON_CLIENT_PREALLOCATE": str(which == "areal_jax").lower()}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | preallocate)
    if done.returncode:
        raise SystemExit(f"the measurement of {which} failed (exit code {done.returncode})")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rows", type=int, default=8, help="rows per micro-batch, over all devices")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=8, help="per step, as full as packing gets them")
    parser.add_argument("--lengths", default="uniform:64:512", help="full, fixed:N or uniform:LOW:HIGH (tokens)")
    parser.add_argument("--packing", choices=("dynamic", "fixed"), default="dynamic")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--remat", choices=REMAT, default="none")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), default="auto")
    parser.add_argument("--max-segments", type=int, default=0, help="per row; default: as the trainer's")
    parser.add_argument("--layers", choices=("auto", "loop", "unrolled"), default="auto")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=-1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before measuring")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="per device, for MFU; default: known or measured"
    )
    parser.add_argument("--baseline", choices=("none", "torch"), default="none")
    parser.add_argument("--baseline-rows", type=int, help="as --rows, for the baseline; default: the same")
    parser.add_argument("--json", metavar="PATH", help="write the results as a list of objects")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.baseline == "torch":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # jax here only looks at the device
    if args.dtype is None:
        args.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    modes = ["areal_jax"] + (["torch"] if args.baseline == "torch" else [])
    given = list(sys.argv[1:] if arguments is None else arguments)
    results, peak = [], None
    for mode in modes:  # each is shown and written as soon as it is there: a time limit loses one, not both
        found = in_own_process(given, mode) if len(modes) > 1 else measure(args, mode)
        peak = peak or peak_flops(args.peak_tflops)
        most = found["seconds_per_step"] * peak[0]
        share = {"mfu": found["flops_per_step"] / most, "mfu_full": found["flops_per_step_full_attention"] / most}
        results.append(found | share | {"peak_flops": peak[0], "peak_is": peak[1]})
        if len(results) == 1:
            show_task(results[0])
        show(results[-1])
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)
    if len(results) > 1:
        print(f"ratio of tokens/s: {results[0]['tokens_per_second'] / results[1]['tokens_per_second']:.2f}")


def show_task(found: dict) -> None:
    print(f"{found['machine']}; {found['size']}: {found['parameters'] / 1e6:.2f} M parameters, {found['dtype']}")
    print(f"{found['sequences']} sequences, {found['tokens']} tokens per step ({found['lengths']})")
    print(f"MFU is a share of {found['peak_flops'] / 1e12:.2f} TFLOP/s ({found['peak_is']})", flush=True)


def show(found: dict) -> None:
    spread = f"{min(found['seconds']):.3f}-{max(found['seconds']):.3f} s"
    print(
        f"{found['mode']:>10}: {found['tokens_per_second']:>11,.0f} tokens/s  MFU {found['mfu']:.1%} "
        f"({found['mfu_full']:.1%} with attention's whole square)  step "
        f"{found['seconds_per_step']:.3f} s ({spread})  compile {found['compile_seconds']:.1f} s  memory "
        f"{found['peak_memory_bytes'] / 2**30:.2f} GiB {found['memory_is']}  fill {found['fill']:.0%}  "
        f"[{found['software']}]",
        flush=True,
    )


if __name__ == "__main__":
    as_role()  # measure what a run does
    main()
