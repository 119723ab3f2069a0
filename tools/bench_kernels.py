"""What the trainer has of its own for a GPU, checked and measured: python tools/bench_kernels.py [--json PATH]

Packed attention (`models/attention.py`): output and gradients against the `xla` oracle in float32, on rows of many
sequences, with grouped queries; the time of the forward pass, and of both. Log-probs of chosen tokens in chunks
(`models/logprobs.py`) at a vocabulary of 151,936: values and gradients against a full softmax, time, memory.

FLOPs: attention 2 · heads · head_dim · Σ length² forward (causal: half of the square) and 2.5 times that backward;
log-probs 6 · tokens · vocabulary · width. What is computed again does not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench_trainer import SIZES, lengths_of, machine

from areal_jax.models import logprobs
from areal_jax.models.attention import attention


def seconds_of(run, *args, repeats: int) -> float:
    """Median of `repeats` runs, each of as many calls as last about 20 ms together."""
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    calls = max(1, min(50, int(0.02 / (time.perf_counter() - start))))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def relative(got, want) -> float:
    """‖got − want‖ / ‖want‖ over all leaves together, in float64."""
    got, want = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def packed_rows(mix: str, rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids `[rows, length]` of rows filled with sequences of a mix, and the lengths."""
    ids, used = np.zeros((rows, length), np.int32), []
    drawn = iter(lengths_of(mix, 2 * rows * length, length, seed))
    for row in ids:
        at, segment = 0, 1
        while at + (n := int(next(drawn))) <= length:
            row[at : at + n] = segment
            at, segment = at + n, segment + 1
            used.append(n)
    return ids, np.array(used, float)


def measure_attention(args, size: str, rows: int, length: int, max_segments: int) -> dict:
    """Forward and backward of packed cuDNN (or XLA where it cannot run), and the error against XLA in float32."""
    c = SIZES[size]
    heads, kv_heads, width = c["num_heads"], c["num_kv_heads"], c["head_dim"]
    ids, lengths = packed_rows(args.lengths, rows, length, 0)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))

    def passes(implementation, dtype, q, k, v, d, ids):
        run = functools.partial(attention, segment_ids=ids, implementation=implementation, max_segments=max_segments)

        def real(x):  # padding has no meaning, forward or backward
            return jnp.where((ids != 0)[..., None, None], x, jnp.zeros((), x.dtype))

        out, pull = jax.vjp(run, *(x.astype(dtype) for x in (q, k, v)))
        return tuple(real(x) for x in (out, *pull(real(d.astype(dtype)))))

    given = (q, k, v, d, ids)
    with jax.default_matmul_precision("highest"):  # a GPU's default for float32 is less than that
        want = jax.jit(functools.partial(passes, "xla", jnp.float32))(*given)
    got = jax.jit(functools.partial(passes, args.attention, jnp.bfloat16))(*given)
    oracle = jax.jit(functools.partial(passes, "xla", jnp.bfloat16))(*given)
    forward = jax.jit(
        lambda q, k, v, ids: attention(q, k, v, ids, implementation=args.attention, max_segments=max_segments)
    )
    both = jax.jit(functools.partial(passes, args.attention, jnp.bfloat16))
    flops = 2.0 * heads * width * float((lengths**2).sum())
    forward_s = seconds_of(forward, q, k, v, ids, repeats=args.repeats)
    both_s = seconds_of(both, q, k, v, d, ids, repeats=args.repeats)
    return {
        "what": "attention", "size": size, "heads": heads, "kv_heads": kv_heads, "head_dim": width, "rows": rows,
        "row_length": length, "max_segments": max_segments, "implementation": args.attention,
        "forward_seconds": forward_s, "seconds": both_s, "tflops": 3.5 * flops / both_s / 1e12,
        "error_out": relative(got[0], want[0]), "error_gradient": relative(got[1:], want[1:]),
        "xla_bf16_error_out": relative(oracle[0], want[0]), "xla_bf16_error_gradient": relative(oracle[1:], want[1:]),
    }  # fmt: skip


def measure_logprobs(args, size: str, tokens: int, logits: int) -> dict:
    """Forward and backward of the chunked log-probs and entropy, and the error against a full softmax in float32."""
    vocab, width = SIZES[size]["vocab_size"], SIZES[size]["hidden_size"]
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16)
    head = jax.random.normal(keys[1], (vocab, width), jnp.float32) * width**-0.5 * 2
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocab)
    weights = jax.random.normal(keys[3], (1, tokens), jnp.float32)
    chunk = logprobs.chunk_size(tokens, vocab, logits)

    def chunked(hidden, head, targets):
        return logprobs.chunked_logprobs(hidden, head, targets, jnp.float32(1.0), chunk)

    def full(hidden, head, targets):
        z = jnp.einsum("rmd,vd->rmv", hidden.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32),
                       precision="highest")  # fmt: skip
        log_p = jax.nn.log_softmax(z, axis=-1)
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def weighted(logprob, entropy, arrays):
        return jnp.sum(arrays[0] * (logprob + 0.01 * entropy)), ()

    def gradient(run):
        def loss(hidden, head, targets, weights):
            return weighted(*run(hidden, head, targets), (weights, ()))[0]

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    def by_chunks(hidden, head, targets, weights):
        given = (hidden, head, targets, (weights, ()), jnp.float32(1.0), chunk)
        return logprobs.chunked_loss(weighted, *given)[0]

    few = slice(0, 512)
    part = (hidden[:, few], head, targets[:, few])
    values = relative(jax.jit(chunked)(*part), jax.jit(full)(*part))
    want = gradient(full)(*part, weights[:, few])
    both, direct = gradient(chunked), jax.jit(jax.grad(by_chunks, argnums=(0, 1)))
    gradients, of_loss = (relative(run(*part, weights[:, few]), want) for run in (both, direct))
    memory = both.lower(hidden, head, targets, weights).compile().memory_analysis()
    forward_s = seconds_of(jax.jit(chunked), hidden, head, targets, repeats=args.repeats)
    seconds, loss_s = (
        seconds_of(run, hidden, head, targets, weights, repeats=args.repeats) for run in (both, direct)
    )
    return {
        "what": "logprobs", "size": size, "tokens": tokens, "vocab": vocab, "width": width, "chunk": chunk,
        "forward_seconds": forward_s, "seconds": seconds, "tflops": 6.0 * tokens * vocab * width / seconds / 1e12,
        "temporary_bytes": int(memory.temp_size_in_bytes), "logits_bytes": 4 * tokens * vocab,
        "error_values": values, "error_gradient": gradients, "loss_seconds": loss_s, "loss_error_gradient": of_loss,
    }  # fmt: skip


def show_attention(one: dict) -> None:
    print(
        f"{one['size']:>5} attention {one['heads']}/{one['kv_heads']} x {one['head_dim']}, {one['implementation']}, "
        f"{one['max_segments']} segments a row: forward {1e3 * one['forward_seconds']:.3f} ms, both "
        f"{1e3 * one['seconds']:.3f} ms, {one['tflops']:.1f} TFLOP/s; error {one['error_out']:.1e} "
        f"(xla in bf16 {one['xla_bf16_error_out']:.1e}), of gradients {one['error_gradient']:.1e} "
        f"({one['xla_bf16_error_gradient']:.1e})",
        flush=True,
    )


def show_logprobs(one: dict) -> None:
    print(
        f"{one['size']:>5} log-probs of {one['tokens']} tokens, vocabulary {one['vocab']}, chunks of {one['chunk']}: "
        f"forward {1e3 * one['forward_seconds']:.2f} ms, both {1e3 * one['seconds']:.2f} ms, {one['tflops']:.1f} "
        f"TFLOP/s; temporaries {one['temporary_bytes'] / 2**30:.2f} GiB (logits {one['logits_bytes'] / 2**30:.2f});"
        f" error {one['error_values']:.1e}, of gradients {one['error_gradient']:.1e}; as a sum over tokens both "
        f"{1e3 * one['loss_seconds']:.2f} ms, error {one['loss_error_gradient']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = jax.default_backend() == "gpu"
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5B", "0.6B", "1.5B"] if gpu else ["tiny"])
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 2048, help="rows x row length")
    parser.add_argument("--row-length", type=int, default=4096 if gpu else 512)
    parser.add_argument("--lengths", default=None, help="mix of sequence lengths, as in bench_trainer.py")
    parser.add_argument("--attention", default="cudnn" if gpu else "xla")
    parser.add_argument("--max-segments", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--logits", type=int, nargs="+", default=[2**27, 2**29], help="of one chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the results as a list of objects")
    args = parser.parse_args()
    args.lengths = args.lengths or f"uniform:{args.row_length // 32}:{args.row_length // 4}"
    print(f"{machine()}; jax {jax.__version__}; {args.tokens} positions, sequences {args.lengths}", flush=True)
    results = []
    for size in args.sizes:
        for segments in args.max_segments:
            results.append(measure_attention(args, size, args.tokens // args.row_length, args.row_length, segments))
            show_attention(results[-1])
            write(args, results)
        for logits in args.logits:
            results.append(measure_logprobs(args, size, args.tokens, logits))
            show_logprobs(results[-1])
            write(args, results)


def write(args, results: list[dict]) -> None:
    """Everything so far: a time limit loses one measurement, not all."""
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([{"machine": machine(), **one} for one in results], file, indent=1)


if __name__ == "__main__":
    main()
