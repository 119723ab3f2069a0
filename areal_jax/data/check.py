"""Reads a data set and says what is in it: python -m areal_jax.data.check DATA [--model FOLDER] [--verify] [--limit N]

Counts, lengths (in tokens with --model, else in characters), bad records with their places, and with --verify those by
which the verifier cannot judge, and how many gold answers it finds right (an accuracy of 1): of mathematics the answer
itself, of programs the published solution if there is one.
Exit code 0 if all is well, 1 if there are bad records or refused answers, 2 if the data cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from areal_jax.data.config import DataConfig
from areal_jax.data.formats import Record
from areal_jax.data.prompts import load_tokenizer, render_prompt
from areal_jax.data.readers import DataError, Dataset, load_dataset
from areal_jax.rewards.code import verify_code
from areal_jax.rewards.loading import check_arguments, judgeable, load_verifier, parameters_of
from areal_jax.rewards.mathematics import verify_math
from areal_jax.rewards.outcome import Score, VerifierError
from areal_jax.rewards.pool import VerifierPool


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    try:
        tokenizer = load_tokenizer(args.model) if args.model else None
        check = _record_check(args) if args.verify else lambda record: None
        settings = DataConfig(format=args.format, bad_record="skip", fields=args.fields)
        data = load_dataset(args.data, settings, check).first(args.limit)
        report = describe(data, tokenizer)
    except (DataError, VerifierError, ValueError, OSError) as error:
        print(f"check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.verify:
        report |= asyncio.run(verify_gold(data, args.verifier, args.verifier_args, args.processes, tokenizer))
    show(report)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return int(bool(report["bad"]) or bool(report.get("refused")))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m areal_jax.data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="file, folder, a folder's split (DIR:train), or 'arithmetic:...'")
    parser.add_argument("--format", default="auto")
    parser.add_argument(
        "--fields", type=_object, default={}, help="our names of the data's fields, as JSON (data.fields)"
    )
    parser.add_argument("--model", default="", help="checkpoint folder, for lengths in tokens")
    parser.add_argument("--limit", type=int, default=0, help="only so many records")
    parser.add_argument("--verify", action="store_true", help="run the verifier on the gold answers")
    parser.add_argument("--verifier", default="", help="import path; default: by the records' fields")
    parser.add_argument("--verifier_args", type=_object, default={}, help="its keyword arguments, as JSON")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", default="", help="write the report there, too")
    return parser.parse_args(arguments)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object: write it as \'{{"name": "value"}}\'')
    return value


def _record_check(args: argparse.Namespace) -> Callable[[Record], None]:
    """What a run asks of every record; raises `VerifierError` for a verifier that cannot be called."""
    if not args.verifier:
        of_answers, of_programs = (judgeable([(verify, args.verifier_args)]) for verify in (verify_math, verify_code))
        return lambda record: (of_programs if "tests" in record else of_answers)(record)
    function = load_verifier(args.verifier)
    check_arguments(function, args.verifier_args)
    needed = {p.name for p in parameters_of(function) if p.default is p.empty} & {"prompt_tokens", "completion_tokens"}
    if needed and not args.model:
        raise VerifierError(f"{args.verifier} takes {' and '.join(sorted(needed))}: give the checkpoint with --model")
    return judgeable([(function, args.verifier_args)])


def describe(data: Dataset, tokenizer: Any = None) -> dict[str, Any]:
    """Counts, the fields that records have, and the lengths of prompts and answers."""
    records = [data[i] for i in range(len(data))]
    fields = sorted({key for record in records for key in record})
    config = DataConfig()
    if tokenizer is not None:
        lengths = [len(render_prompt(record, tokenizer, config)) for record in records]
    else:
        lengths = [len(_text(record)) for record in records]
    prompts = [_text(record) for record in records]
    return {
        "name": data.name,
        "records": len(records),
        "bad": len(data.skipped),
        "bad_places": data.skipped[:20],
        "duplicate_prompts": len(prompts) - len(set(prompts)),
        "without_answer": sum(record.get("answer") is None and "tests" not in record for record in records),
        "fields": {field: sum(field in record for record in records) for field in fields},
        "unit": "tokens" if tokenizer is not None else "characters",
        "prompt_lengths": quantiles(lengths),
    }


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 90 %, 99 % and greatest value."""
    ordered, shares = sorted(values), {"min": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()}


async def verify_gold(
    data: Dataset, verifier: str, options: dict[str, Any], processes: int, tokenizer: Any = None
) -> dict[str, Any]:
    """How many records' own answers (or published programs) have an accuracy of 1.

    The verifier is given what it gets in a run: the record's fields, the texts and, with a tokenizer, their tokens.
    """
    todo = [(i, gold) for i in range(len(data)) if (gold := gold_completion(data[i])) is not None]
    async with VerifierPool(processes) as pool:

        async def one(index: int, gold: str) -> Any:
            record = data[index]
            path = verifier or f"areal_jax.rewards:{'verify_code' if 'tests' in record else 'verify_math'}"
            fields = dict(record) | {"prompt": _text(record), "completion": gold}
            if tokenizer is not None:
                prompt = render_prompt(record, tokenizer, DataConfig())
                fields["prompt"] = tokenizer.decode(prompt, skip_special_tokens=True)
                completion = tokenizer.encode(gold, add_special_tokens=False)
                fields |= {"prompt_tokens": prompt, "completion_tokens": completion}
            return await pool.submit(path, fields | options)

        outcomes = await asyncio.gather(*(one(index, gold) for index, gold in todo))
    accepted = [isinstance(outcome, Score) and outcome.accuracy >= 1.0 for outcome in outcomes]
    refused = [(i, _why(outcome)) for (i, _), ok, outcome in zip(todo, accepted, outcomes) if not ok]
    return {
        "verified": len(todo),
        "accepted": sum(accepted),
        "refused": len(refused),
        "refused_places": [f"{data.place(i)}: {why}" for i, why in refused[:20]],
    }


def gold_completion(record: Record) -> str | None:
    """What a perfect model might answer, from the record alone; None where the record does not say."""
    if "tests" in record:
        program = record.get("canonical_solution") or record.get("code")
        return None if program is None else f"```python\n{record.get('starter', '')}{program}\n```"
    if "answer" in record:
        return f"The answer is \\boxed{{{record['answer']}}}."
    return None


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    print(f"{report['name']}: {report['records']} records, {report['bad']} bad")
    print(f"  prompts ({report['unit']}): " + ", ".join(f"{k} {v}" for k, v in report["prompt_lengths"].items()))
    print(f"  {report['duplicate_prompts']} duplicate prompts, {report['without_answer']} without an answer or tests")
    print("  fields: " + ", ".join(f"{name} ({count})" for name, count in report["fields"].items()))
    if "verified" in report:
        print(f"  gold answers: {report['accepted']} of {report['verified']} accepted by the verifier")
    for place in [*report["bad_places"], *report.get("refused_places", ())]:
        print(f"  ! {place}")


def _text(record: Record) -> str:
    return record["prompt"] if "prompt" in record else "\n".join(turn["content"] for turn in record["messages"])


def _why(outcome: Any) -> str:
    return f"accuracy {outcome.accuracy:g}" if isinstance(outcome, Score) else f"{outcome.kind}: {outcome.text:.200}"


if __name__ == "__main__":
    sys.exit(main())
