#!/usr/bin/env python3
"""A run's folder as a page with pictures: python tools/report.py runs/x [--out DIR]

Writes report.md and PNG files to DIR (default: report/ in the run's folder): the learning curve, staleness, throughput,
the mismatch of engine and trainer, and the timeline of all processes. Needs matplotlib (the extra "dev").
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError:
    sys.exit("report: error: matplotlib is not installed: bash launch/setup.sh dev")
matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from areal_jax.config import ConfigError, load
from areal_jax.launch.snapshot import MISMATCH, histogram, trained_rate
from areal_jax.launch.summary import lines
from areal_jax.metrics.writers import read_metrics

COLOURS = {"generating": "#2a7f62", "training": "#2f5d9b", "verifying": "#7a9e3f", "loading_weights": "#d98e04"}
WAITING, OTHER = "#d9d9d9", "#9b6fb0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    try:
        config = load(args.workdir)
    except ConfigError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    rows = read_metrics(args.workdir)
    out = args.out or args.workdir / "report"
    out.mkdir(parents=True, exist_ok=True)
    pictures = [
        learning_curve(rows, out / "learning.png"),
        staleness(rows, config["controller"]["max_staleness"], out / "staleness.png"),
        throughput(rows, out / "throughput.png"),
        mismatch(rows, out / "mismatch.png"),
        timeline(args.workdir, out / "timeline.png"),
    ]
    path = out / "report.md"
    path.write_text(page(config, args.workdir, [p for p in pictures if p]), encoding="utf-8")
    print(path)
    return 0


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is a number."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def learning_curve(rows, path: Path) -> Path | None:
    """Training accuracy, the reward where that is another number, and held-out accuracy over steps."""
    curves = {name: series(rows, name) for name in ("reward/accuracy", "reward/mean")}
    if not curves["reward/mean"][0]:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.5))
    for (name, curve), colour in zip(curves.items(), (COLOURS["training"], COLOURS["loading_weights"]), strict=True):
        if name == "reward/accuracy" or curve != curves["reward/accuracy"]:
            axis.plot(*curve, color=colour, label=f"training: {name}", linewidth=1.2)
    held_out = series(rows, "eval/accuracy")
    if held_out[0]:
        axis.plot(*held_out, "o-", color="black", label="held-out accuracy", markersize=4, linewidth=0.8)
    axis.set(xlabel="training step", title="Learning")
    axis.legend(frameon=False)
    return _save(figure, path)


def staleness(rows, bound: int, path: Path) -> Path | None:
    """Consumed samples by lag, and the bound."""
    counts = histogram(rows)
    if not counts:
        return None
    figure, axis = plt.subplots(figsize=(8, 3))
    axis.bar(range(len(counts)), counts, color=COLOURS["generating"])
    axis.axvline(bound + 0.5, color="black", linestyle="--", linewidth=1)
    axis.set_xticks(range(bound + 1))
    axis.set(xlabel=f"lag in versions (bound {bound})", ylabel="samples", title="Staleness of what was trained on")
    return _save(figure, path)


def throughput(rows, path: Path) -> Path | None:
    """Tokens per second of both sides over steps."""
    if not series(rows, "perf/gen_tokens_per_s")[0]:
        return None
    trained = [row | {"trained": rate} for row in rows if (rate := trained_rate(row)) is not None]
    figure, axis = plt.subplots(figsize=(8, 3))
    axis.plot(*series(rows, "perf/gen_tokens_per_s"), color=COLOURS["generating"], label="generated", linewidth=1)
    axis.plot(*series(trained, "trained"), color=COLOURS["training"], label="trained", linewidth=1)
    axis.set(xlabel="training step", ylabel="tokens / s", title="Throughput")
    axis.legend(frameon=False)
    return _save(figure, path)


def mismatch(rows, path: Path) -> Path | None:
    """How far the engine's log-probs are from the trainer's: rounding at lag 0, the policy's movement above."""
    curves = {kind: series(rows, name) for kind, name in MISMATCH.items()}
    if not any(values for _, values in curves.values()):
        return None
    figure, axis = plt.subplots(figsize=(8, 3))
    for (kind, curve), colour in zip(curves.items(), (COLOURS["training"], COLOURS["loading_weights"]), strict=True):
        axis.plot(*curve, color=colour, label=f"tokens of {kind}", linewidth=1)
    axis.set(xlabel="training step", ylabel="mean |Δ log-prob|", title="Engine against trainer", yscale="log")
    axis.legend(frameon=False)
    return _save(figure, path)


def timeline(workdir: Path, path: Path) -> Path | None:
    """What every process did when."""
    files = sorted((workdir / "timeline").glob("*.jsonl"))
    spans = {f.stem: [json.loads(line) for line in f.read_text().splitlines() if line.endswith("}")] for f in files}
    spans = {name: found for name, found in spans.items() if found}
    if not spans:
        return None
    zero = min(span["start"] for found in spans.values() for span in found)
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.4 * len(spans)))
    seen: dict[str, str] = {}
    for place, (_, found) in enumerate(spans.items()):
        for span in found:
            phase = span["phase"]
            idle = phase == "idle" or phase.startswith("waiting")
            label = "waiting or idle" if idle else phase if phase in COLOURS else "other"
            seen[label] = WAITING if idle else COLOURS.get(phase, OTHER)
            axis.barh(place, span["end"] - span["start"], left=span["start"] - zero, color=seen[label], height=0.8)
    axis.set_yticks(range(len(spans)), list(spans))
    axis.set(xlabel="seconds", title="Who did what")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in seen.values()]
    axis.legend(patches, list(seen), frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return _save(figure, path)


def page(config: dict[str, Any], workdir: Path, pictures: list[Path]) -> str:
    """The report as Markdown."""
    parts = [f"# {config['name']}", "", f"`{workdir}`, model `{config['model']}`", ""]
    summary = workdir / "summary.json"
    if summary.exists():
        values = json.loads(summary.read_text(encoding="utf-8"))
        parts += ["```", *lines(values, workdir, values.get("wall_seconds", 0.0), 0), "```", ""]
    return "\n".join([*parts, *(f"![{p.stem}]({p.name})\n" for p in pictures)])


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
