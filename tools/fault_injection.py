"""Tries every fault of the matrix on a tiny run and says what came of it; writes the table of docs/reliability.md.

    python tools/fault_injection.py --list
    python tools/fault_injection.py --only rollout --seeds 3 --json found.json
    python tools/fault_injection.py --seeds 3 --docs docs/reliability.md

Faults at a chosen point are tried once; those at a random moment once per seed. Ends with exit code 1 if any outcome
was not as it must be; the folders of such runs are kept, and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.faults.harness import Outcome, may_mount, run
from tools.faults.matrix import all_faults

BEGIN, END = "<!-- made by tools/fault_injection.py: begin -->", "<!-- end -->"


def table(outcomes: list[Outcome]) -> str:
    """One row per fault: tries, how many came out right, and what it cost."""
    rows = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.fault].append(outcome)
    lines = [
        "| fault | tries | as it must be | processes started again | steps made again | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, tries in rows.items():
        right = sum(not outcome.problems for outcome in tries)
        again = ", ".join(words(outcome.started_again) for outcome in tries)
        steps = ", ".join(str(outcome.steps_again) for outcome in tries)
        seconds = ", ".join(f"{outcome.seconds:.0f}" for outcome in tries)
        lines.append(f"| {name} | {len(tries)} | {right} | {again} | {steps} | {seconds} |")
    return "\n".join(lines)


def words(started_again: dict[str, int]) -> str:
    """How often each role was started again: "rollout-0 twice"."""
    times = {1: "", 2: " twice"}
    return " and ".join(f"{role}{times.get(n, f' {n} times')}" for role, n in started_again.items()) or "none"


def commit() -> str:
    """What the code under test is, in words."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False).stdout

    changed = " with changes that are not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"commit {git('rev-parse', '--short=10', 'HEAD').strip() or 'unknown'}{changed}"


def report(outcomes: list[Outcome]) -> str:
    """The table with when, where, and how often."""
    wrong = sum(bool(outcome.problems) for outcome in outcomes)
    codes = " and ".join(sorted({outcome.code for outcome in outcomes}))
    head = (
        f"{datetime.date.today():%Y-%m-%d}, {codes}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}. {len({o.fault for o in outcomes})} faults, "
        f"{len(outcomes)} runs, {len({o.seed for o in outcomes})} of each fault at a random moment; {wrong} did not "
        "come out as they must."
    )
    return f"{head}\n\n{table(outcomes)}"


def write_docs(path: Path, text: str) -> None:
    """Replace what is between the marks."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only faults whose name holds this")
    parser.add_argument("--seeds", type=int, default=1, help="tries of each fault that comes at a random moment")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the outcomes to this file, and report on all that it holds")
    parser.add_argument("--docs", type=Path, help="write the table into this page")
    parser.add_argument("--cache", default="", help="folder of compiled programs; default: one for this call")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    known = [fault.name for fault in all_faults()]
    faults = [fault for fault in all_faults() if options.only in fault.name]
    if options.list:
        print("\n".join(fault.name for fault in faults))
        return 0
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    outcomes, code = [Outcome(**row) for row in found if row["fault"] in known], commit()  # some may have gone
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        cache = options.cache or f"{scratch}/compiled"
        for fault in faults:
            if fault.disk and not may_mount():
                print(f"not tried: {fault.name} (it needs the right to mount a file system)", flush=True)
                continue
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            for seed in [0] if fault.point or not fault.random else seeds:
                folder = Path(tempfile.mkdtemp(prefix="fault-"))
                outcome = run(fault, folder / "x", seed, cache)
                outcome.code = code
                outcomes = [o for o in outcomes if (o.fault, o.seed) != (outcome.fault, seed)] + [outcome]
                outcomes.sort(key=lambda o: (known.index(o.fault), o.seed))
                print(f"{'WRONG' if outcome.problems else 'right'}  {outcome.seconds:4.0f} s  {fault.name}"
                      f"{f', {outcome.where}' if outcome.where else ''}", flush=True)  # fmt: skip
                for problem in outcome.problems:
                    print(f"       {problem}", flush=True)
                if outcome.problems:
                    print(f"       see {folder}", flush=True)
                else:
                    shutil.rmtree(folder)
                if options.json:
                    options.json.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1) + "\n")
    if options.docs:
        write_docs(options.docs, report(outcomes))
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
