"""What the live view shows, gathered from `metrics.jsonl` and the controller's status: plain values, no drawing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from areal_jax.metrics.clock import idle_fraction

BARS = "▁▂▃▄▅▆▇█"
SILENT_SECONDS = 5.0
# Kind of token -> the metric that compares the log-probs that engine and trainer give it.
MISMATCH = {"lag 0": "mismatch/logprob_abs_diff_mean", "lag > 0": "mismatch_stale/logprob_abs_diff_mean"}
# All that is read of a line of metrics.jsonl; the rest need not be kept.
NAMES = (
    "reward/accuracy", "reward/mean", "eval/accuracy", "perf/gen_tokens_per_s", "batch/trained_tokens", "time/step",
    "length/mean", "response_length/mean", "actor/entropy", "staleness/hist", "staleness/max",
    "staleness/dropped_total", "staleness/dropped", "warning", *MISMATCH.values(),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Member:
    """One process as the controller knows it."""

    name: str
    phase: str  # "generating", "waiting:weights", ...
    busy: float  # share of its time, since its start, that it was neither waiting nor idle
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment; numbers that are not known yet are None, series are empty."""

    step: int
    steps: int
    accuracy: Sequence[float] = ()  # training accuracy, per step
    reward: float | None = None
    held_out: Sequence[tuple[int, float]] = ()  # (step, accuracy)
    generated_per_second: float | None = None
    trained_per_second: float | None = None
    lengths: float | None = None
    entropy: float | None = None
    staleness: Sequence[int] = ()  # samples per lag, over the run so far
    max_staleness: float | None = None
    bound: int = 0
    dropped: float = 0
    mismatch: Mapping[str, float] = dataclasses.field(default_factory=dict)  # mean |Δ log-prob| by kind of token
    warning: str = ""  # of the controller's disk, else the trainer's about the last step
    queue: float | None = None
    running: float | None = None
    waiting_for: str = ""
    members: Sequence[Member] = ()


def snapshot(rows: Sequence[Mapping[str, Any]], status: Mapping[str, Any], config: Mapping[str, Any]) -> Snapshot:
    """The newest state from the lines of metrics.jsonl and `Status.data` (empty before the controller answers)."""
    last = next((row for row in reversed(rows) if "reward/mean" in row), {})  # not one with an evaluation alone
    series = [value for row in rows if (value := first(row, "reward/accuracy", "reward/mean")) is not None]
    held_out = [(row["step"], row["eval/accuracy"]) for row in rows if number(row.get("eval/accuracy")) is not None]
    return Snapshot(
        step=int(last.get("step", 0)),
        steps=config["trainer"]["steps"],
        accuracy=series,
        reward=first(last, "reward/mean"),
        held_out=held_out,
        generated_per_second=first(last, "perf/gen_tokens_per_s"),
        trained_per_second=trained_rate(last),
        lengths=first(last, "length/mean", "response_length/mean"),
        entropy=first(last, "actor/entropy"),
        staleness=histogram(rows),
        max_staleness=max((v for row in rows if (v := first(row, "staleness/max")) is not None), default=None),
        bound=config["controller"]["max_staleness"],
        dropped=first(last, "staleness/dropped_total", "staleness/dropped") or 0,
        mismatch={kind: value for kind, name in MISMATCH.items() if (value := first(last, name)) is not None},
        warning=str(status.get("disk") or last.get("warning") or ""),
        queue=number(status.get("queue_depth")),
        running=number(status.get("running_groups")),
        waiting_for=str(status.get("waiting_for") or ""),
        members=[member(name, role) for name, role in sorted((status.get("roles") or {}).items())],
    )


def member(name: str, role: Mapping[str, Any]) -> Member:
    """One entry of the status's `roles`."""
    details = []
    if number(role.get("version")) is not None:
        details.append(f"version {role['version']}")
    if role.get("role") == "rollout":
        details.append(f"{role.get('running', 0)} samples, {role.get('slots', 0)} slots")
    if (silent := number(role.get("heard"))) is not None and silent > SILENT_SECONDS:
        details.append(f"silent for {silent:.0f} s")
    busy = 1.0 - idle_fraction(role.get("clock") or {})
    return Member(name, str(role.get("phase") or "?"), busy, ", ".join(details))


def trained_rate(row: Mapping[str, Any]) -> float | None:
    """Trained tokens per second of one step, the wait for its batch included: by the clock of what is generated."""
    tokens, seconds = number(row.get("batch/trained_tokens")), number(row.get("time/step"))
    return tokens / seconds if tokens is not None and seconds else None


def histogram(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Samples per lag, summed over the lines' "staleness/hist"."""
    counts: list[int] = []
    for row in rows:
        here = row.get("staleness/hist") or []
        counts += [0] * (len(here) - len(counts))
        for lag, count in enumerate(here):
            counts[lag] += int(count)
    return counts


def sparkline(values: Sequence[float], width: int = 60, low: float | None = None, high: float | None = None) -> str:
    """The series as a line of bars, averaged down to `width`; the scale is from `low` to `high` (default: its own)."""
    if not values:
        return ""
    size = min(width, len(values))
    edges = [len(values) * i // size for i in range(size + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means) if low is None else low, max(means) if high is None else high
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, max(0, int((v - low) / span * len(BARS))))] for v in means)


def first(values: Mapping[str, Any], *names: str) -> float | None:
    """The first of `names` that is there and is a number."""
    return next((found for name in names if (found := number(values.get(name))) is not None), None)


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
