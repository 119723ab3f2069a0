#!/usr/bin/env python3
"""Asynchronous against synchronous RL, on this machine, for the same number of trained samples.

    python tools/bench_async.py --config configs/quickstart.py --steps 80 --json bench.json --plot bench.png

Runs the same job once per mode (and repeat), each from the same checkpoint, and prints one table: trained tokens per
second, seconds of training, idle share of each side, final accuracy. Start-up, compilation and evaluation are left out.
Tokens per second are those of the steady state: without the first steps, whose batches were generated while the trainer
compiled, and the last, beside which nothing is generated. The picture shows what both sides did during some seconds in
the middle of each run.

`sync` is the fastest synchronous mode that we have; `sync_exact` is what `controller.max_staleness=0` gives by itself,
where every decode has one shape, so that a run can be repeated bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Both sides have all cores in turn, and no reason to let the other go first.
SYNC = {"controller.max_staleness": 0, "launch.rollout_env.NPROC": os.cpu_count(), "launch.rollout_nice": 0}
MODES = {
    "sync": SYNC | {"rollout.exact": "never"},
    "sync_exact": SYNC,
    "eta1": {"controller.max_staleness": 1},
    "eta4": {"controller.max_staleness": 4},
    "eta4_uninterrupted": {"controller.max_staleness": 4, "rollout.interruptible": False},
    "eta4_fixed_packing": {"controller.max_staleness": 4, "trainer.packing": "fixed"},
}
COLOURS = {
    "training": "#2a6f97", "generating": "#2a9d8f", "loading_weights": "#e9c46a", "publishing": "#e9c46a",
    "waiting": "#e76f51", "idle": "#f4a261", "evaluating": "#9d8189", "compiling": "#cccccc", "starting": "#cccccc",
}  # fmt: skip
FIRST, LAST = 10, 5  # steps at both ends that are not the steady state


def run(mode: str, workdir: Path, options: argparse.Namespace) -> dict:
    """One run of the job in `mode`; its figures."""
    settings = {"trainer.steps": options.steps, "trainer.eval_every": 0, "metrics.view": "none", **MODES[mode]}
    command = [sys.executable, "-m", "areal_jax.launch", f"--config={options.config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()] + options.overrides
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the run in {workdir} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "mode": mode,
        "tokens_per_second": steady_rate(workdir),
        "wall_seconds": sum(summary["trainer_seconds"].values()),
        "trainer_idle": summary["trainer_idle_fraction"],
        "rollout_idle": summary["rollout_idle_fraction"],
        "accuracy": summary["accuracy_after"],
        "trained_samples": summary["trained_samples"],
        "max_staleness": summary["max_staleness"],
        "dropped_stale": summary["dropped_stale"],
    }


def steady_rate(workdir: Path) -> float:
    """Trained tokens per second, the waits for batches included."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "actor/loss" in line][FIRST:-LAST]
    return sum(step["batch/trained_tokens"] for step in steps) / sum(step["time/step"] for step in steps)


def median(rows: list[dict]) -> dict:
    """The figures of one mode: medians over its repeats."""
    merged = dict(rows[0])
    for key, value in rows[0].items():
        if isinstance(value, (int, float)):
            merged[key] = statistics.median(row[key] for row in rows)
    return merged | {"repeats": len(rows), "tokens_per_second_of_repeats": [r["tokens_per_second"] for r in rows]}


def table(results: list[dict]) -> str:
    base = next((r["tokens_per_second"] for r in results if r["mode"] == "sync"), None)
    lines = [
        "| mode | trained tokens/s | to sync | training seconds | trainer idle | rollout idle | accuracy | lag ≤ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        speedup = f"{r['tokens_per_second'] / base:.2f}×" if base else ""
        accuracy = "" if r["accuracy"] is None else f"{r['accuracy']:.3f}"
        lines.append(
            f"| {r['mode']} | {r['tokens_per_second']:.0f} | {speedup} | {r['wall_seconds']:.0f} "
            f"| {r['trainer_idle']:.0%} | {r['rollout_idle']:.0%} | {accuracy} | {r['max_staleness']:.0f} |"
        )
    return "\n".join(lines)


def spans(workdir: Path, name: str) -> list[dict]:
    path = workdir / "timeline" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(folders: dict[str, Path], path: Path, seconds: float) -> None:
    """What trainer and first rollout worker of each mode did during `seconds` in the middle of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(folders), 1, figsize=(12, 1.5 * len(folders) + 0.8), squeeze=False)
    for axis, (mode, folder) in zip(axes[:, 0], folders.items(), strict=True):
        trainer, rollout = spans(folder, "trainer-0"), spans(folder, "rollout-0")
        training = [s for s in trainer if s["phase"] == "training"]
        begin = (training[0]["start"] + training[-1]["end"] - seconds) / 2 if training else 0.0
        for row, lane in enumerate((rollout, trainer)):
            for span in lane:
                start, end = max(span["start"] - begin, 0.0), min(span["end"] - begin, seconds)
                if end > start:
                    colour = COLOURS.get(span["phase"].split(":")[0], "#8d99ae")
                    axis.barh(row, end - start, left=start, color=colour, height=0.8)
        axis.set_yticks([0, 1], ["rollout", "trainer"])
        axis.set_xlim(0, seconds)
        axis.set_title(mode, loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("seconds")
    shown = ("generating", "training", "loading_weights", "waiting", "idle")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in shown]
    figure.legend(handles, ["generating", "training", "weights", "waiting", "idle"], ncols=5, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def engine_rate(options: argparse.Namespace, engine: str) -> float:
    """The run's engine alone, nothing else running: tokens per second at 64 concurrent requests."""
    path = options.workdir / "engine.json"
    command = [sys.executable, "tools/bench_engine.py", "--concurrent", "64", "--json", str(path), "--engine", engine]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads(path.read_text())
    return next(row["tokens_per_second"] for row in rows if row["concurrent"] == 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--steps", type=int, default=80, help="training steps of each run")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated, of " + ", ".join(MODES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_async"), help="a new folder for the runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--plot-seconds", type=float, default=20.0)
    options, options.overrides = parser.parse_known_args()
    modes = options.modes.split(",")
    if options.steps < 2 * (FIRST + LAST):
        parser.error(f"--steps {options.steps}: at least {2 * (FIRST + LAST)}, of which some are the steady state")
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown modes {sorted(unknown)}; known: {', '.join(MODES)}")
    if bad := [o for o in options.overrides if not o.startswith("--config.")]:
        parser.error(f"unknown options {bad}; settings are changed with --config.KEY=VALUE")
    options.workdir = options.workdir.resolve()
    if options.workdir.exists():
        parser.error(f"{options.workdir} exists; name another folder with --workdir")
    options.workdir.mkdir(parents=True)

    engine = "vllm" if "--config.rollout.engine=vllm" in options.overrides else "jax"
    rate = engine_rate(options, engine)
    rows: dict[str, list[dict]] = {mode: [] for mode in modes}
    for repeat in range(options.repeats):  # modes in turn, so that a drift of the machine meets all alike
        for mode in modes:
            rows[mode].append(run(mode, options.workdir / f"{mode}-{repeat}", options))
            print(f"{mode} #{repeat}: {rows[mode][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    results = [median(rows[mode]) | {"engine_tokens_per_second_at_64": rate} for mode in modes]
    machine = f"{platform.node()}, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{machine}; {options.steps} steps of {options.config}, medians of {options.repeats}; engine: {engine}\n")
    print(table(results))
    print(f"\nthe engine ({engine}) alone, 64 concurrent requests: {rate:.0f} tokens/s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw({mode: options.workdir / f"{mode}-0" for mode in modes}, options.plot, options.plot_seconds)


if __name__ == "__main__":
    main()
