"""What `tools/soak.py` has found, as a picture and as the tables of docs/soak.md."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

MARKS = {  # of the two parts of the page: a run with kills, and one without
    True: ("<!-- made by tools/soak.py: kills -->", "<!-- end of kills -->"),
    False: ("<!-- made by tools/soak.py: nobody killed -->", "<!-- end of nobody killed -->"),
}


def write(found: dict[str, Any], path: Path) -> None:
    """Replace the part of the page that is about such a run."""
    begin, end = MARKS[found["every"] is not None]
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{tables(found)}\n\n{end}{after}", encoding="utf-8")


def tables(found: dict[str, Any]) -> str:
    """When, where and what was run; the accounts; and each role's growth over its longest life."""
    problems = "; ".join(found["problems"])
    head = (
        f"{found['date']}, {found['code']}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}, load {found['load_at_end']} at the end; {found['minutes']:g} minutes, seed "
        f"{found['seed']}. {f'**Wrong: {problems}.**' if problems else 'Nothing was wrong.'}"
    )
    lags = found["groups_by_lag"]
    again = found["steps_made_again"]
    rows = [(f"killed: {kind}", n) for kind, n in sorted(found["kills"].items(), key=lambda item: -item[1])]
    rows += [
        ("steps made" + (" (made again after going back to a checkpoint)" if again else ""),
         f"{found['steps']}" + (f" ({again})" if again else "")),
        ("samples trained on", f"{found['samples']:,}"),
        ("samples per second, all starts included", found["samples_per_second"]),
        ("epochs finished", found["epochs_finished"]),
        (f"prompts by lag {', '.join(map(str, lags))} (bound {found['bound']})", ", ".join(map(str, lags.values()))),
        ("late or repeated results, refused", found["late_or_duplicate_results_refused"]),
        ("prompts quarantined", found["quarantined"]),
    ]  # fmt: skip
    if found["longest_end_after_launcher_killed"]:
        seconds = found["longest_end_after_launcher_killed"]
        rows.append(("longest time until all had ended after a launcher was killed", f"{seconds} s"))
    accounts = ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    growth = ["| longest life of | MB | MB, later | descriptors | shared MB | updates between | judged |"]
    growth.append("|---|---|---|---|---|---|---|")
    for name, role in found["roles"].items():
        cells = [name, role["mb_after_a_third"], role["mb_last"]]
        cells += [f"{role[f'{what}_after_a_third']:g}, {role[f'{what}_last']:g}" for what in ("fds", "shared_mb")]
        growth.append(f"| {' | '.join(map(str, [*cells, role['updates'], 'yes' if role['judged'] else 'no']))} |")
    return "\n".join([head, "", *accounts, "", *growth])


def today() -> str:
    return f"{datetime.date.today():%Y-%m-%d}"


def draw(found: dict[str, Any], path: Path, window: float = 30.0) -> None:
    """Samples per second (over `window`), memory and descriptors by role; kills are the marks at the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rate, memory, files) = plt.subplots(3, 1, figsize=(11, 8.5), sharex=True)
    end = max((at for at, _ in found["trained"]), default=0.0)
    times = [i * window / 3 for i in range(int(3 * end / window) + 1)]
    rates = [sum(n for at, n in found["trained"] if t - window < at <= t) / window for t in times]
    rate.plot(times, rates, color="#2f5d9b")
    top = rate.get_ylim()[1]
    for kinds, colour, label in (
        (("rollout", "rewards", "controller"), "#bbbbbb", "worker, rewards or controller killed"),
        (("trainer",), "#d98e04", "trainer killed"), (("launcher", "everything"), "#c0392b", "launcher or all killed"),
    ):  # fmt: skip
        at = [event["at"] for event in found["events"] if event["kind"] in kinds]
        rate.plot(at, [top] * len(at), "|", color=colour, markersize=9, label=label)
    rate.set_ylabel("samples trained on per second")
    rate.legend(loc="lower right", fontsize=8)
    for axis, column, label in ((memory, 0, "resident memory, MB"), (files, 1, "open descriptors")):
        for name in found["roles"]:
            # A pause in the line where the role was dead.
            points = [(row["at"], row[name][column] if name in row else float("nan")) for row in found["series"]]
            axis.plot(*zip(*points, strict=True), linewidth=0.8, label=name)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    memory.legend(loc="upper right", fontsize=8, ncols=4)
    files.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
