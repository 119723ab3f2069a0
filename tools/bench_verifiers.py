"""Answers per second of the verifiers: python tools/bench_verifiers.py [--gsm8k FILE...] [--human-eval FILE]

Each mode is measured `--repeats` times after a warm-up, through the pool that a run uses, beside a baseline of the same
run: math-verify called directly in one process, and plain `python` without any sandbox. With `--gsm8k` the answers are
those of the files, each also perturbed, and it is counted how many right and how many wrong ones were accepted. With
`--human-eval` the wrong programs are those of `mutants.py` that plain execution finds wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from mutants import mutants, plainly

from areal_jax.rewards import Score, VerifierPool, sandbox
from areal_jax.rewards.code import extract_program

MATH, CODE = "areal_jax.rewards:verify_math", "areal_jax.rewards:grade_code"
LATEX = [
    (r"\frac{%d}{%d}", lambda a, b: str(Fraction(a, b))),
    (r"\{%d, %d\}", lambda a, b: rf"\{{{b}, {a}\}}"),
    (r"\sqrt{%d} + %d", lambda a, b: rf"{b} + \sqrt{{{a}}}"),
    (r"(%d, %d]", lambda a, b: f"({a}, {b}]"),
]


def numbers(count: int) -> list[dict]:
    """Completions whose answer is a plain number, every second one right."""
    texts = [f"so it is {i} \\boxed{{{i + i % 2}}}" for i in range(count)]
    return [{"completion": text, "answer": str(i), "right": i % 2 == 0} for i, text in enumerate(texts)]


def latex(count: int) -> list[dict]:
    """Completions that need symbolic comparison: fractions, sets, roots, intervals; every second one right."""
    records = []
    for i in range(count):
        template, gold = LATEX[i % len(LATEX)]
        a, b = 2 + i, 3 + 2 * i
        shown = template % (a, b + i // len(LATEX) % 2)
        right = i // len(LATEX) % 2 == 0
        records.append({"completion": f"Thus $\\boxed{{{shown}}}$.", "answer": gold(a, b), "right": right})
    return records


def gsm8k(paths: list[str]) -> list[dict]:
    """Every solution with its own answer, and with four wrong ones."""
    records = []
    for line in "".join(Path(path).read_text(encoding="utf-8") for path in paths).splitlines():
        solution = json.loads(line)["answer"]
        steps, _, gold = solution.rpartition("####")
        value = int(gold.replace(",", ""))
        records.append({"completion": solution, "answer": gold, "right": True})
        wrong = sorted({value + 1, value - 1, -value, value * 10} - {value})
        records += [{"completion": f"{steps}#### {w}", "answer": gold, "right": False} for w in wrong]
    return records


def human_eval(path: str) -> tuple[list[dict], list[dict]]:
    """Every canonical solution; every mutant of one that is wrong (those that pass in a plain process are left out)."""
    problems = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    pairs = [(problem, program) for problem in problems for program in mutants(problem).values()]
    wrong = [pair for pair, passes in zip(pairs, plainly(pairs), strict=True) if not passes]
    print(f"human_eval: of {len(pairs)} mutants {len(pairs) - len(wrong)} pass their tests and are left out")

    def record(problem: dict, program: str, right: bool) -> dict:
        common = {"tests": problem["test"], "entry_point": problem["entry_point"], "starter": problem["prompt"]}
        return common | {"completion": f"```python\n{program}\n```", "right": right}

    solutions = [record(problem, problem["prompt"] + problem["canonical_solution"], True) for problem in problems]
    return solutions, [record(problem, program, False) for problem, program in wrong]


async def through_pool(pool: VerifierPool, path: str, records: list[dict]) -> dict:
    """Judges all records; seconds, and what was accepted."""
    start = time.perf_counter()
    outcomes = await asyncio.gather(*(pool.submit(path, record, timeout=120.0) for record in records))
    seconds = time.perf_counter() - start
    failures = [f"{outcome.kind}: {outcome.text}" for outcome in outcomes if not isinstance(outcome, Score)]
    if failures:
        print(f"a failure: {failures[0]}", file=sys.stderr)
    accepted = [isinstance(outcome, Score) and outcome.accuracy == 1.0 for outcome in outcomes]
    return {
        "seconds": seconds,
        "right_accepted": sum(a and r["right"] for a, r in zip(accepted, records)),
        "wrong_accepted": sum(a and not r["right"] for a, r in zip(accepted, records)),
        "failures": len(failures),
    }


def directly(records: list[dict]) -> dict:
    """math-verify by itself, in this process, with its own time limit by signals."""
    from math_verify import parse, verify

    start = time.perf_counter()
    accepted = [verify(parse(f"${r['answer']}$"), parse(r["completion"])) for r in records]
    seconds = time.perf_counter() - start
    right = sum(a and r["right"] for a, r in zip(accepted, records))
    return {"seconds": seconds, "right_accepted": right, "wrong_accepted": sum(accepted) - right, "failures": 0}


def unprotected(records: list[dict]) -> dict:
    """Each program and its tests in one plain interpreter: fast, and neither safe nor sound."""
    start, right, wrong = time.perf_counter(), 0, 0
    for r in records:
        program = f"{extract_program(r['completion'])}\n{r['tests']}\ncheck({r['entry_point']})\n"
        passed = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, check=False).returncode == 0
        right, wrong = right + (passed and r["right"]), wrong + (passed and not r["right"])
    return {"seconds": time.perf_counter() - start, "right_accepted": right, "wrong_accepted": wrong, "failures": 0}


async def measure(mode: str, records: list[dict], run: Callable[[list[dict]], object], repeats: int) -> dict:
    """One line of the table; `run` judges records, as a coroutine or at once."""

    async def once(part: list[dict]) -> dict:
        result = run(part)
        return await result if asyncio.iscoroutine(result) else result

    await once(records[: max(2, len(records) // 10)])
    results = [await once(records) for _ in range(repeats)]
    rates = [len(records) / result.pop("seconds") for result in results]
    right = sum(r["right"] for r in records)
    row = {"mode": mode, "answers": len(records), "right": right, "wrong": len(records) - right, **results[-1]}
    row |= {"answers_per_second": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
    rate = f"{row['answers_per_second']:9.1f} answers/s ({row['lowest']:.1f} to {row['highest']:.1f})"
    accepted = f"{row['right_accepted']} of {row['right']} right, {row['wrong_accepted']} of {row['wrong']} wrong"
    print(f"{mode:28s} {rate}   accepted {accepted}; {row['failures']} failures", flush=True)
    return row


async def main(args: argparse.Namespace) -> None:
    rows = []
    async with VerifierPool(args.processes, 120.0) as pool:
        problems = gsm8k(args.gsm8k) if args.gsm8k else numbers(args.count)
        name = "gsm8k" if args.gsm8k else "numbers"
        few = problems[: args.count]
        rows.append(await measure(f"{name}_pool", problems, lambda r: through_pool(pool, MATH, r), args.repeats))
        rows.append(await measure(f"{name}_math_verify_alone", few, directly, args.repeats))
        symbolic = latex(args.count)
        rows.append(await measure("latex_pool", symbolic, lambda r: through_pool(pool, MATH, r), args.repeats))
        rows.append(await measure("latex_math_verify_alone", symbolic, directly, args.repeats))
        if args.human_eval:
            solutions, wrong = human_eval(args.human_eval)
            for isolation in ("bwrap", "landlock"):
                if problem := sandbox.works(isolation):
                    print(f"human_eval_{isolation}: not measured: {problem}")
                    continue
                for label, programs in ((isolation, solutions), (f"{isolation}_mutants", wrong)):
                    sent = [program | {"isolation": isolation} for program in programs]
                    run = functools.partial(through_pool, pool, CODE)
                    rows.append(await measure(f"human_eval_{label}", sent, run, args.repeats))
            rows.append(await measure("human_eval_unprotected", solutions, unprotected, args.repeats))
    if args.json:
        machine = {"machine": platform.node(), "cores": os.cpu_count(), "processes": pool.processes}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([row | machine for row in rows], file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", nargs="+", default=[], help="JSONL files of GSM8K; default: made-up numbers")
    parser.add_argument("--human-eval", default="", help="HumanEval's JSONL file; default: no code is measured")
    parser.add_argument("--count", type=int, default=2000, help="made-up answers, and answers given to the baseline")
    parser.add_argument("--processes", type=int, default=None, help="verifier processes; default: one per core")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="", help="write the results there")
    asyncio.run(main(parser.parse_args()))
