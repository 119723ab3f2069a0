#!/usr/bin/env python3
"""Makes the small checkpoint that the quick start begins with: python tools/make_toy_checkpoint.py --out DIR

A Qwen2-architecture network and a byte-level tokenizer in Hugging Face format, trained from scratch on worked sums
("3+5+9?" -> "3+5=8;8+9=17####17"). Its teacher is careless: in three of four cases where the units add to 12 or more
it forgets to carry. So the network is right on some held-out sums and far from all, which is what reinforcement
learning has to mend. What comes out is an ordinary checkpoint: nothing in the system knows where it came from. The same
seed gives the same checkpoint on the same machine with the same version of jax.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from areal_jax.data import arithmetic
from areal_jax.models import Model, ModelConfig, export_hf

END, PAD = "<|endoftext|>", "<|pad|>"
TRAIN_SEED, HELD_OUT_SEED = 1_000_003, 2_000_003  # neither is used by a config: runs draw problems of their own
ROW = 256  # tokens per packed row


def main() -> None:
    args = arguments()
    started = time.time()
    tokenizer = make_tokenizer()
    model = Model(model_config(tokenizer, args.width, args.layers, args.heads))
    sums = functools.partial(arithmetic.Arithmetic, max_terms=args.max_terms)
    problems = sums(count=10**9, seed=TRAIN_SEED, held_out=0)
    held_out = sums(count=args.held_out, seed=HELD_OUT_SEED, held_out=1)
    print(f"{model.num_params():,} parameters, {args.steps} steps of {args.rows} rows of {ROW} tokens")

    params = model.init(jax.random.key(args.seed))
    optimizer = make_optimizer(args.learning_rate, args.steps)
    state, drawn = optimizer.init(params), 0
    for step in range(1, args.steps + 1):
        arrays, drawn = pack(tokenizer, problems, drawn, args.rows, args.careless)
        params, state, loss = train_step(model, optimizer, params, state, jnp.asarray(arrays))
        if step % 100 == 0 or step == args.steps:
            greedy, sampled = (accuracy(model, params, tokenizer, held_out, t) for t in (0.0, 1.0))
            print(
                f"{time.time() - started:5.0f} s  step {step}  loss {float(loss):.3f}  "
                f"held-out accuracy: greedy {greedy:.1%}, sampled {sampled:.1%}", flush=True,
            )  # fmt: skip
    export_hf(model, params, args.out, dtype=jnp.bfloat16, overwrite=True)
    tokenizer.save_pretrained(args.out)
    size = sum(entry.stat().st_size for entry in os.scandir(args.out))
    print(f"{args.out}: {size / 1e6:.2f} MB, made in {time.time() - started:.0f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=3, help="of 32: vLLM's CPU build has no smaller ones")
    parser.add_argument("--max-terms", type=int, default=16)
    parser.add_argument("--careless", type=float, default=0.75, help="how often the teacher forgets to carry")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=22, help="packed rows per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--held-out", type=int, default=256, help="problems to measure on")
    return parser.parse_args()


# -- checkpoint --------------------------------------------------------------------------------------------------------


def make_tokenizer():
    """A byte-level BPE tokenizer with one merge, GSM8K's "####": it reads any text, and does not have to be trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "##", "####"]
    bpe = models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("#", "#"), ("##", "##")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(PAD, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=2048)


def model_config(tokenizer, width: int, layers: int, heads: int) -> ModelConfig:
    """A small Qwen2, with initial weights large enough to learn fast at this width."""
    return ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), hidden_size=width, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, mlp_size=width * 8 // 3 // 16 * 16, tie_embeddings=True,
        qkv_bias=True, max_positions=2048, init_std=width**-0.5,
    )  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------


def careless(record: dict, random: np.random.Generator, chance: float) -> str:
    """The worked solution of a teacher who, with this chance, forgets to carry where the units add to 12 or more."""
    terms = arithmetic.terms_of(record["prompt"])
    totals = terms[:1]
    for term in terms[1:]:
        forgets = totals[-1] % 10 + term >= 12 and random.random() < chance
        totals.append(totals[-1] + term - (10 if forgets else 0))
    return arithmetic.worked(totals, terms)


def pack(tokenizer, problems, first: int, rows: int, chance: float) -> tuple[np.ndarray, int]:
    """Worked problems from number `first` on, in full rows: int32 [4, rows, ROW] and the number of the next problem.

    The four are tokens, positions, segment_ids, and a mask of the answers' tokens.
    """
    arrays, index = np.zeros((4, rows, ROW), np.int32), first
    for row in range(rows):
        start = segment = 0
        while True:
            record = problems[index]
            prompt = tokenizer.encode(record["prompt"])
            answer = tokenizer.encode(careless(record, np.random.default_rng([index, 1]), chance) + END)
            end = start + len(prompt) + len(answer)
            if end > ROW:
                break
            index, segment = index + 1, segment + 1
            arrays[:3, row, start:end] = prompt + answer, np.arange(end - start), np.full(end - start, segment)
            arrays[3, row, start + len(prompt) : end] = 1
            start = end
    return arrays, index


# -- training and measuring --------------------------------------------------------------------------------------------


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(50, steps // 2), steps, learning_rate / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(model: Model, optimizer, params, state, arrays):
    """One step on packed rows (`pack`): the mean loss of the answers' tokens."""
    tokens, positions, segments, mask = arrays

    def loss(params):
        logprobs, _ = model.token_logprobs(params, tokens, positions, segments)
        return -jnp.sum(jnp.where(mask > 0, logprobs, 0.0)) / jnp.sum(mask).astype(jnp.float32)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def accuracy(model: Model, params, tokenizer, problems, temperature: float) -> float:
    """Share of `problems` whose last number after "####" is right; greedy where `temperature` is 0."""
    records = [problems[i] for i in range(len(problems))]
    encoded = [tokenizer.encode(record["prompt"]) for record in records]
    prompts = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for row, tokens in zip(prompts, encoded):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in encoded], np.int32)
    longest = max(len(tokenizer.encode(record["solution"])) for record in records) + 8
    end = tokenizer.eos_token_id
    out = generate(model, params, prompts, lengths, longest, end, jnp.float32(temperature), jax.random.key(0))
    texts = [tokenizer.decode(row[: (row == end).argmax() or None]) for row in np.asarray(out)]
    return float(np.mean([t.rpartition("####")[1:] == ("####", r["answer"]) for t, r in zip(texts, records)]))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def generate(model: Model, params, prompts, lengths, steps: int, end: int, temperature, key):
    """Continue right-padded `prompts` [N, P] by `steps` tokens: int32 [N, steps], `end` from the end on."""
    count, width = prompts.shape
    cache = model.init_cache(count, width + steps)
    logits, cache = model.prefill(params, cache, prompts, lengths, jnp.arange(count))

    def step(carry, key):
        logits, cache, position, done = carry
        noise = jax.random.gumbel(key, logits.shape) * temperature
        token = jnp.where(done, end, jnp.argmax(logits + noise, axis=-1))
        done |= token == end
        logits, cache = model.decode(params, cache, token, position)
        return (logits, cache, position + 1, done), token

    start = (logits, cache, lengths, jnp.zeros(count, bool))
    _, tokens = jax.lax.scan(step, start, jax.random.split(key, steps))
    return tokens.T


if __name__ == "__main__":
    main()
