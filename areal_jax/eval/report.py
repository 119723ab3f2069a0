"""What an evaluation leaves behind: problems.jsonl, summary.json, and a table for people."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from areal_jax.disk import write_whole
from areal_jax.eval.estimates import summarize
from areal_jax.eval.runner import Result

PROBLEMS, SUMMARY = "problems.jsonl", "summary.json"


def problem_line(result: Result) -> str:
    """One line of problems.jsonl: the problem, its answers with their scores, and how many of them are right."""
    kept = ("id", "task_id", "prompt", "messages", "answer")
    line = {"index": result.index, **{key: result.record[key] for key in kept if key in result.record}}
    line |= {"scored": len(result.scored), "right": sum(sample.accuracy >= 1.0 for sample in result.scored)}
    line["samples"] = [
        {"error": sample.error, "detail": sample.detail}
        if sample.error
        else {key: value for key, value in dataclasses.asdict(sample).items() if key not in ("error", "detail")}
        for sample in result.samples
    ]
    return json.dumps(line, ensure_ascii=False, default=str)


def summary_of(results: Sequence[Result], ks: Sequence[int], about: Mapping[str, Any]) -> dict[str, Any]:
    """`about`, the estimates, failures by name, and the means over samples as a run's own evaluation counts them."""
    scored = [sample for result in results for sample in result.scored]
    failed = Counter(sample.error for result in results for sample in result.samples if sample.error)
    n = max(1, len(scored))
    summary: dict[str, Any] = {
        **about,
        "problems": len(results),
        "samples": len(scored),
        "failed": failed.total(),
        "failures": dict(failed),
        "problems_without_score": sum(not result.scored for result in results),
    }
    if scored:
        answered = [[sample.accuracy for sample in result.scored] for result in results if result.scored]
        estimates = summarize(answered, ks)
        summary["accuracy"] = sum(sample.accuracy for sample in scored) / n
        summary["estimates"] = {name: estimate._asdict() for name, estimate in estimates.items()}
        summary["reward"] = sum(sample.reward for sample in scored) / n
        summary["tokens"] = sum(sample.tokens for sample in scored) / n
        summary["truncated"] = sum(sample.finish_reason == "length" for sample in scored) / n
        names = sorted({name for sample in scored for name in sample.metrics})
        values = {name: [s.metrics[name] for s in scored if name in s.metrics] for name in names}
        summary["metrics"] = {name: sum(found) / len(found) for name, found in values.items()}
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people; says how each interval was found, and what failed."""
    lines = [
        f"{summary['model']} on {summary['data']}",
        f"{summary['problems']} problems, {summary['samples']} scored samples, temperature "
        f"{summary['temperature']:g}, engine {summary['engine']}, {summary['seconds']:.0f} s",
    ]
    if "estimates" in summary:
        lines += ["", f"{'':10}{'value':>9}   95 % interval"]
        for name, e in summary["estimates"].items():
            lines.append(f"{name:10}{e['value']:9.2%}   {e['low']:.2%} to {e['high']:.2%} ({e['method']})")
        lines += ["", f"{'tokens':10}{summary['tokens']:9.1f}   per answer; cut off: {summary['truncated']:.2%}"]
        lines += [f"{'reward':10}{summary['reward']:9.3f}   as it would be trained on"]
        lines += [f"{name:10}{value:9.3f}" for name, value in summary["metrics"].items()]
    for name, count in summary["failures"].items():
        lines.append(f"FAILED    {count:9}   {name}: without a score, left out of every number above")
    if summary["problems_without_score"]:
        lines.append(f"{summary['problems_without_score']} problems have no score at all")
    return "\n".join(lines)


class Writer:
    """Writes problems.jsonl as problems are done, so that an evaluation that is stopped leaves what it has."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (folder / PROBLEMS).open("w", encoding="utf-8")

    def problem(self, result: Result) -> None:
        self._file.write(problem_line(result) + "\n")
        self._file.flush()

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Ends; `summary`, if any, becomes summary.json. A file without any problem in it is not left behind."""
        empty = not self._file.tell()
        self._file.close()
        if empty:
            (self.folder / PROBLEMS).unlink()
        if summary is not None:
            write_whole(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
