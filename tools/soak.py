"""A whole run under random SIGKILLs, and its accounts at the end: python tools/soak.py --workdir=runs/soak

Every few seconds one process is killed: a rollout worker, the reward service, the controller, the trainer, now and then
the launcher itself, or everything at once; then the same command is started again. Meanwhile resident memory and open
descriptors of every role are written down. `--minutes` after its first step the run is stopped by SIGINT, started once
more for a few steps, and left to finish. Then every sample is looked for: none may be trained on twice, none lost, none
too old; no process and no shared memory may be left. `--every=0` kills nobody: a run to see memory stay flat.

Anything wrong is listed, and the exit code is 1; so is memory, shared memory or descriptors of a role that grow beyond
`GROWTH`. Needs psutil and, for the plot, matplotlib (the extra "dev").
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from areal_jax.metrics.trained import read_trained  # noqa: E402
from tools import judge, soak_page  # noqa: E402
from tools.fault_injection import commit  # noqa: E402

# How often whom: what starts in a second more often than what loads and compiles for half a minute.
VICTIMS = {"controller": 5, "rewards": 4, "rollout": 2, "trainer": 0.7, "launcher": 0.1, "everything": 0.1}
SETTINGS = {
    "name": "soak", "data.train": "arithmetic:count=512,seed=1,min_terms=2,max_terms=6", "data.eval": "",
    "controller.batch_size": 16, "controller.group_size": 4, "controller.max_staleness": 4,
    "controller.heartbeat_limit": 10.0, "rollout.workers": 2, "rollout.slots": 32, "trainer.rows": 8,
    "trainer.learning_rate": 1e-5, "trainer.checkpoint_every": 5, "trainer.eval_every": 0,
    "launch.restarts": 10**6, "launch.trainer_restarts": 10**6, "launch.stop_grace": 60.0,
    "metrics.view": "lines", "metrics.tensorboard": False,
}  # fmt: skip
ENDLESS = 10**6  # steps
STEP_SECONDS = 600.0  # for one step, when nobody is killed
# By how much a role's longest life may grow after its first third, in MB of memory and of shared memory and in
# descriptors: what allocators and caches come to later than that.
GROWTH = {"mb": 8.0, "shared_mb": 8.0, "fds": 8.0}
# And the trainer's memory by so many MB for each update, for a reason that is known: TensorStore 0.1.86 keeps some
# 37 kB for each checkpoint, of which there is one in five updates.
TRAINER_GROWTH = 0.015
# Whose processes are replaced after so many answers by those who keep them: where nobody is killed, one life for all.
RENEWED = frozenset({"verifier"})
JUDGED_UPDATES = 100  # a life with fewer in that time says nothing
GONE_SECONDS = 150.0  # for what is left to end, when the launcher was killed


class Run(judge.Watched):
    """The run's launcher, started again and again."""

    def __init__(self, workdir: Path, overrides: list[str]):
        super().__init__(workdir, workdir.with_suffix(".tmp"))
        self.overrides = overrides

    def begin(self, steps: int = ENDLESS) -> None:
        settings = SETTINGS | {"trainer.steps": steps}
        command = [sys.executable, "-m", "areal_jax.launch", "--config=configs/quickstart.py"]
        command += [f"--workdir={self.workdir}", *(f"--config.{key}={value}" for key, value in settings.items())]
        self.launcher = self.start(command + self.overrides, self.workdir.with_suffix(".log"))

    def left(self, seconds: float, files: bool = True) -> list[str]:
        """Waits for all to end; what is left then, in words."""
        return self.left_behind(seconds, finished=(self.workdir / "summary.json").exists(), files=files)

    def log(self, lines: int = 40) -> str:
        """The end of what the launcher has printed."""
        return "\n".join(self.workdir.with_suffix(".log").read_text().splitlines()[-lines:])


class Soak:
    """Kills and measures `run` for some time; `events`, `series` and `problems` say what happened."""

    def __init__(self, run: Run, seed: int, every: tuple[float, float] | None):
        self.run, self.random, self.every = run, random.Random(seed), every
        self.began = time.time()
        self.events: list[dict[str, Any]] = []
        self.series: list[dict[str, Any]] = []  # one row per second
        self.problems: list[str] = []
        self.over = False  # the run came to its end
        self.steps: list[float] = []  # when each line of the trainer's record was seen

    def one_step(self) -> None:
        """Wait for the next training step, killing nobody."""
        deadline, before = time.monotonic() + STEP_SECONDS, len(self.steps)
        while len(self.steps) == before and not self.problems:
            self.measure()
            if self.run.launcher.poll() is not None or time.monotonic() > deadline:
                self.problems.append(f"no step within {STEP_SECONDS:.0f} s: {self.run.log()}")
            time.sleep(0.5)

    def spend(self, seconds: float) -> None:
        """Kill and measure for so long; ends early if the run ends, which it should not."""
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + self._pause()
        while (now := time.monotonic()) < end and not self.problems:
            self.measure()
            if (code := self.run.launcher.poll()) is not None:
                self.problems.append(f"the run ended with exit code {code} although nobody had killed its launcher")
            elif now >= next_kill:
                self.kill()
                next_kill = time.monotonic() + self._pause()
            time.sleep(0.5)

    def _pause(self) -> float:
        return self.random.uniform(*self.every) if self.every else float("inf")

    def measure(self) -> None:
        """One row of memory (MB), descriptors, shared memory (MB) and process ids per role, children included; of
        complete roles only."""
        row: dict[str, Any] = {"at": round(time.time() - self.began, 2)}
        self.steps += [row["at"]] * (len(_record(self.run.workdir)) - len(self.steps))
        for name, members in self.run.roles().items():
            with contextlib.suppress(psutil.Error):
                memory = sum(p.memory_info().rss for p in members) / 1e6
                shared = judge.shared_bytes(members) / 1e6
                files, pids = sum(p.num_fds() for p in members), [p.pid for p in members]
                row[name] = [round(memory, 1), files, round(shared, 2), pids]
        self.series.append(row)

    def kill(self) -> None:
        """SIGKILL to somebody who is there.

        Mostly to one that has seen a step since its last death: on a slow machine the run must get on between two.
        """
        roles = self.run.roles()
        kind = self.random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        names = sorted(name for name in roles if name.split("-")[0] == kind)
        if kind in ("launcher", "everything"):
            names = [kind]
        if not names:
            return
        name, at = self.random.choice(names), round(time.time() - self.began, 2)
        last = max((event["at"] for event in self.events if event["name"] == name), default=0.0)
        idle = not self.steps or self.steps[-1] < last
        if idle and (kind in ("launcher", "everything") or self.random.random() > 0.2):
            return
        self.events.append({"at": at, "kind": kind, "name": name})
        if kind in ("launcher", "everything"):
            victims = [self.run.launcher.pid] if kind == "launcher" else [p.pid for p in self.run.processes()]
            self._start_again(victims, kind)
        else:
            with contextlib.suppress(psutil.Error):
                roles[name][0].kill()

    def _start_again(self, victims: list[int], kind: str) -> None:
        started = time.monotonic()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run.launcher.wait()
        left = self.run.left(GONE_SECONDS, files=kind == "launcher")  # else the guardian is dead, too
        self.events[-1]["gone_after"] = round(time.monotonic() - started, 2)
        self.problems += [f"after the death of {kind}: {what}" for what in left]
        self.run.begin()

    def live(self, seconds: float, extra: int) -> int:
        """All of it; returns the run's number of steps. Whatever goes wrong is a problem, and the figures stay."""
        try:
            self.one_step()
            self.spend(seconds)
            self.one_step()  # everybody is there
            if not self.problems:
                return self.finish(extra)
        except (OSError, ValueError, RuntimeError, psutil.Error, subprocess.SubprocessError) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        self.run.kill()
        return len(read_trained(self.run.workdir))

    def finish(self, extra: int) -> int:
        """Stop by SIGINT, start again for `extra` steps, wait for the end; returns the run's number of steps."""
        self.run.launcher.send_signal(signal.SIGINT)
        if (code := self.run.launcher.wait(GONE_SECONDS)) != 130:
            self.problems.append(f"after SIGINT the launcher's exit code is {code}, not 130")
        self.problems += self.run.left(1.0)
        trained = max(read_trained(self.run.workdir)) + 1
        if (saved := judge.newest_state(self.run.workdir).version) != trained:
            self.problems.append(f"SIGINT came after step {trained}; the newest checkpoint is of version {saved}")
        steps = saved + extra
        self.run.begin(steps)
        deadline = time.monotonic() + 600.0
        while self.run.launcher.poll() is None and time.monotonic() < deadline:
            self.measure()
            time.sleep(0.5)
        if (code := self.run.launcher.poll()) != 0:
            self.problems.append(f"the last leg's exit code is {code}")
        self.over = code == 0
        self.problems += self.run.left(1.0)
        return steps


def result(soak: Soak, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures, and the accounts."""
    workdir = soak.run.workdir
    trained = read_trained(workdir)
    summary_path = workdir / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    bound, group_size = SETTINGS["controller.max_staleness"], SETTINGS["controller.group_size"]
    wrong, ledger = list(judge.secrets(workdir)) if workdir.exists() else [], None
    if soak.over:
        state = judge.newest_state(workdir)
        ledger = state.ledger
        wrong += judge.ledger_problems(trained, state, steps=steps, bound=bound, group_size=group_size)
        wrong += judge.summary_problems(workdir, bound=bound) if summary else ["there is no summary.json"]
    else:
        wrong.append("the run did not come to its end: what it was trained on was not held against its ledger")
    samples = sum(group.samples for groups in trained.values() for group in groups)
    lags = Counter(step - group.oldest for step, groups in trained.items() for group in groups)
    roles = growth(soak.series, soak.steps, RENEWED if soak.every is None else frozenset())
    # Of a step that was made again after going back to a checkpoint, the last time counts.
    times = {row["version"]: at for row, at in zip(_record(workdir), soak.steps, strict=False)}
    return {
        "date": soak_page.today(), "code": commit(),
        "machine": f"{platform.node()}, {os.cpu_count()} cores, {platform.machine()}",
        "load_at_end": round(os.getloadavg()[0], 2),
        "minutes": options.minutes, "seed": options.seed, "every": soak.every,
        "kills": dict(Counter(e["kind"] for e in soak.events)),
        "steps": steps, "steps_made_again": len(_record(workdir)) - len(trained), "samples": samples,
        "samples_per_second": round(samples / max(soak.steps, default=1.0), 2),
        "epochs_finished": len(ledger.epochs_done) if ledger else None,
        "groups_by_lag": dict(sorted(lags.items())), "bound": bound,
        "quarantined": ledger.totals.get("quarantined", 0) if ledger else None,
        "late_or_duplicate_results_refused": summary.get("late_results", 0) + summary.get("duplicate_results", 0),
        "longest_end_after_launcher_killed": max((e.get("gone_after", 0.0) for e in soak.events), default=0.0),
        "roles": roles, "problems": soak.problems + wrong + growth_problems(roles, all_judged=soak.every is None),
        "events": soak.events, "series": soak.series,
        "trained": [[at, sum(group.samples for group in trained[i])] for i, at in times.items() if i in trained],
    }  # fmt: skip


def _record(workdir: Path) -> list[dict[str, Any]]:
    """Of all steps that the trainer has made, those that it made again too."""
    return judge.lines(workdir / "trained.jsonl")


def growth(
    series: list[dict[str, Any]], steps: Sequence[float], renewed: Set[str] = frozenset()
) -> dict[str, dict[str, Any]]:
    """Per role: greatest memory (MB) and descriptors; and of its longest life with the same processes (with whichever,
    of `renewed` roles) the updates (at the times `steps`) after the first third, and what it had at the beginning and
    the end of that time, each the median over a quarter of it."""
    found = {}
    for name in sorted({name for row in series for name in row} - {"at"}):
        rows = [(row["at"], *row[name]) for row in series if name in row]
        pids, _ = Counter(tuple(row[-1]) for row in rows).most_common(1)[0]
        life = [row for row in rows if name in renewed or tuple(row[-1]) == pids]
        late = life[len(life) // 3 :]
        quarter = max(1, len(late) // 4)
        first, last = (late[place][0] for place in (quarter // 2, -1 - quarter // 2))
        found[name] = {
            "lives": len({row[-1][0] for row in rows}), "mb_max": max(row[1] for row in rows),
            "fds_max": max(row[2] for row in rows), "longest_life_rows": len(life),
            "updates": bisect.bisect(steps, last) - bisect.bisect(steps, first),
        }  # fmt: skip
        found[name]["judged"] = found[name]["updates"] >= JUDGED_UPDATES
        for column, what in enumerate(("mb", "fds", "shared_mb"), 1):
            for place, part in (("after_a_third", late[:quarter]), ("last", late[-quarter:])):
                found[name][f"{what}_{place}"] = round(statistics.median(row[column] for row in part), 2)
    return found


def growth_problems(roles: Mapping[str, Mapping[str, Any]], all_judged: bool = False) -> list[str]:
    """What has grown beyond what is right, in words, and, where it must be, who was not judged."""
    problems = []
    for name, role in roles.items():
        if not role["judged"]:
            few = f"{name} was not judged: {role['updates']} updates in its longest life, {JUDGED_UPDATES} are needed"
            problems += [few] * all_judged
            continue
        for what, allowed in GROWTH.items():
            before, after = role[f"{what}_after_a_third"], role[f"{what}_last"]
            if what == "mb" and name.startswith("trainer-"):
                allowed += TRAINER_GROWTH * role["updates"]
            if after - before > allowed:
                grew = f"{name} grew from {before} to {after} {what} in {role['updates']} updates"
                problems.append(f"{grew}; at most {allowed:.0f} more are right")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", default="3,12", help="seconds between two kills, least and most; 0: no kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/soak"), help="a new folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--docs", type=Path, help="write the tables into this page")
    options, overrides = parser.parse_known_args()
    if bad := [o for o in overrides if not o.startswith("--config.")]:
        parser.error(f"unknown options {bad}; settings are changed with --config.KEY=VALUE")
    options.workdir = options.workdir.resolve()
    if options.workdir.exists():
        parser.error(f"{options.workdir} exists; name another folder with --workdir")
    options.workdir.parent.mkdir(parents=True, exist_ok=True)
    least, _, most = options.every.partition(",")
    every = (float(least), float(most or least)) if float(least) else None

    run = Run(options.workdir, overrides)
    soak = Soak(run, options.seed, every)
    run.begin()
    try:
        found = result(soak, soak.live(60 * options.minutes, extra=8), options)
    finally:
        run.kill()
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    if options.plot:
        soak_page.draw(found, options.plot)
    if options.docs:
        soak_page.write(found, options.docs)
    print(json.dumps({key: x for key, x in found.items() if key not in ("events", "series", "trained")}, indent=1))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
