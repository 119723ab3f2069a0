"""The end of a run on screen: what `summary.json` holds, in words."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# (key in summary.json, what it is called on screen, how it is written)
_LINES = (
    ("steps", "training steps", "{:,.0f}"),
    ("trained_samples", "samples trained on", "{:,.0f}"),
    ("max_staleness", "greatest staleness", "{:.0f}"),
    ("staleness_bound", "its bound (η)", "{:.0f}"),
    ("dropped_stale", "groups dropped as stale", "{:,.0f}"),
    ("generated_tokens_per_second", "tokens generated per second", "{:,.0f}"),
    ("trainer_idle_fraction", "trainer idle", "{:.1%}"),
    ("rollout_idle_fraction", "rollout idle", "{:.1%}"),
    ("worst_mismatch", "log-prob mismatch at lag 0", "{:.1e}"),  # of engine and trainer, the worst step's mean
    ("recompiles_after_warmup", "recompilations after warm-up", "{:.0f}"),
)
_IF_ANY = (  # the same, shown where they are not 0
    ("skipped_records", "records of the data left out"),
    ("filtered", "groups filtered out"),
    ("quarantined", "prompts given up (quarantined)"),
)


def lines(values: Mapping[str, Any], workdir: str | os.PathLike, wall: float, restarts: int) -> list[str]:
    """The summary as lines of text; `wall` is the launcher's own time in seconds."""
    rows = []
    before, after = values.get("accuracy_before"), values.get("accuracy_after")
    if after is not None:
        was = f"{before:.1%} → " if before is not None else ""
        rows.append(("held-out accuracy", f"{was}{after:.1%}"))
    for key, label, form in _LINES:
        value = values.get(key)
        if isinstance(value, (int, float)):
            rows.append((label, form.format(value)))
    rows += [(label, f"{values[key]:,.0f}") for key, label in _IF_ANY if values.get(key)]
    if failed := values.get("failed"):
        rows.append(("tries of samples that failed", ", ".join(f"{n:,} {error}" for error, n in failed.items())))
    rows.append(("time, everything included", f"{int(wall) // 60} min {int(wall) % 60:02d} s"))
    if restarts:
        rows.append(("processes started again", str(restarts)))
    export = Path(workdir) / "export"
    if export.is_dir():
        rows.append(("checkpoint (Hugging Face)", str(export)))
    rows.append(("everything else", str(workdir)))
    width = max(len(label) for label, _ in rows)
    return [f"  {label:<{width}}  {value}" for label, value in rows]


def show(
    values: Mapping[str, Any], workdir: str | os.PathLike, wall: float, restarts: int, file: TextIO | None = None
) -> None:
    """Print the summary."""
    print("\n".join(["", "The run is finished.", *lines(values, workdir, wall, restarts)]), file=file or sys.stdout)
