"""The soak tool for half a minute, and the accounts that it ends with: each kind of mistake is named."""

import json
import subprocess
import types

import pytest
from whole_runs import ROOT, python

from areal_jax.controller.ledger import CONSUMED, OPEN
from areal_jax.controller.snapshot import CoreState, FinishedState, LedgerState, PromptState
from areal_jax.metrics.trained import TrainedGroup
from tools import judge, soak, soak_page


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.faults
def test_a_short_soak_kills_and_finds_nothing_wrong(tmp_path):
    found = tmp_path / "soak.json"
    done = python(
        ROOT / "tools/soak.py", "--minutes=0.7", "--every=2,4", f"--workdir={tmp_path / 'run'}", f"--json={found}",
        f"--plot={tmp_path / 'soak.png'}", "--config.rollout.workers=1", timeout=550,
    )  # fmt: skip
    assert done.returncode == 0
    result = json.loads(found.read_text())
    assert result["problems"] == [] and result["kills"]
    assert result["samples"] == result["steps"] * 64 and max(map(int, result["groups_by_lag"])) <= result["bound"]
    assert {"controller", "rewards-0", "rollout-0", "trainer-0", "launcher", "guardian"} <= set(result["roles"])
    assert (tmp_path / "soak.png").stat().st_size > 10_000


# Eight prompts, two a step: one epoch is over, of the next two are trained on, one waits finished, one is in flight.
ORDER = {0: (0, (3, 1)), 1: (0, (0, 2)), 2: (0, (5, 4)), 3: (0, (6, 7)), 4: (1, (2, 6))}
TRAINED = {
    step: [TrainedGroup(epoch, record, 2 * step + i, 4, max(0, step - i)) for i, record in enumerate(records)]
    for step, (epoch, records) in ORDER.items()
}
FATE = bytes(CONSUMED if i in (2, 6) else OPEN if i in (0, 5) else 0 for i in range(8))
LEDGER = LedgerState(
    size=8, seed=1, shuffle=True, epoch=1, cursor=4, next_number=12, fate={1: FATE}, totals={"consumed": 10},
    epochs_done=[{"epoch": 0, "prompts": 8, "consumed": 8}], again=[], counters={}, failed={}, quarantined=[], lags={},
    token_lags={},
)  # fmt: skip
STATE = CoreState(
    format=1, version=5, ledger=LEDGER, inflight=[PromptState(1, 0, 10)],
    finished=[FinishedState(PromptState(1, 5, 11), [])],
)  # fmt: skip


def problems(changed=None, state=STATE, steps=5):
    return judge.ledger_problems(TRAINED | (changed or {}), state, steps=steps, bound=1, group_size=4)


def replaced(struct, **values):
    return type(struct)(**({name: getattr(struct, name) for name in struct.__struct_fields__} | values))


def test_right_accounts_are_right():
    assert problems() == []


def test_each_mistake_is_named():
    (twice, *_) = problems({2: [TrainedGroup(0, 5, 4, 4, 2), TrainedGroup(0, 6, 5, 4, 2)]})
    assert twice == "record 6 of epoch 0 was trained on 2 times"
    good = TrainedGroup(1, 2, 8, 4, 4)
    old = "step 4 trained on version 2 (group 9); the bound is 1"
    assert problems({4: [good, TrainedGroup(1, 6, 9, 4, 2)]}) == [old]
    assert problems({4: [good, TrainedGroup(1, 6, 9, 3, 4)]}) == ["step 4 trained on 3 of 4 samples of group 9"]
    assert problems(state=replaced(STATE, inflight=[])) == ["lost, neither trained on nor waiting: [(1, 0)]"]
    again = replaced(LEDGER, again=[PromptState(1, 5, -1)])
    assert problems(state=replaced(STATE, ledger=again)) == ["record 5 of epoch 1 waits 2 times"]
    assert "epoch 1: the ledger and the trainer differ on records [6]" in problems({4: [good]})
    assert "no batch is known for steps [5]" in problems(steps=6)
    (short, *_) = problems({1: [TrainedGroup(0, 0, 2, 4, 1)]})
    assert short.startswith("epoch 0: 7 prompts were trained on; the ledger says")


# --- Growth -----------------------------------------------------------------------------------------------------------


def series(seconds=1800, lives=1, role="trainer-0", **grows):
    """One row each second, of one role; `grows`: mb, fds or shared_mb as a function of the time."""
    flat = {"mb": lambda t: 500.0 + t % 7, "fds": lambda t: 60 + t % 3, "shared_mb": lambda t: 4.0} | grows
    return [
        {"at": float(t), role: [*(flat[what](t) for what in ("mb", "fds", "shared_mb")), [t * lives // seconds]]}
        for t in range(seconds)
    ]


def grown(series, step_seconds=1.0, **options):
    steps = [step_seconds * i for i in range(int(len(series) / step_seconds))]
    return soak.growth_problems(soak.growth(series, steps), **options)


@pytest.mark.parametrize("what", ["mb", "fds", "shared_mb"])
def test_what_grows_all_the_time_is_found_and_named(what):
    start = {"mb": 500.0, "fds": 60, "shared_mb": 4.0}[what]
    (problem,) = grown(series(**{what: lambda t: start + t // 20}))
    assert problem.startswith("trainer-0 grew from ") and f" {what} in 899 updates; at most " in problem


def test_what_is_known_to_grow_and_what_grows_at_the_beginning_is_right():
    assert grown(series()) == []
    assert grown(series(mb=lambda t: 300.0 + min(t, 500), fds=lambda t: 60 + min(t, 500) // 10)) == []
    assert grown(series(mb=lambda t: 500.0 + 0.037 * (t // 5))) == []


def test_what_the_trainer_may_grow_by_with_every_update_is_the_trainers_alone():
    def grows(t):
        return 500.0 + 0.0145 * t

    assert grown(series(mb=grows)) == []
    (problem,) = grown(series(role="rollout-0", mb=grows))
    assert problem.startswith("rollout-0 grew from ") and problem.endswith("at most 8 more are right")


def test_a_pool_that_gets_one_more_process_has_not_grown():
    more = series(mb=lambda t: 500.0 + 60.0 * (t >= 900), fds=lambda t: 60 + 10 * (t >= 900))
    assert grown(more)
    for row in more[900:]:
        row["trainer-0"][-1].append(7)
    assert grown(more) == []


def test_a_life_too_short_to_say_anything_is_not_judged():
    leaks = {"mb": lambda t: 500.0 + t}
    assert grown(series(**leaks)) and not grown(series(lives=30, **leaks)) and not grown(series(**leaks), 60.0)


def test_where_nobody_is_killed_a_role_that_could_not_be_judged_is_a_problem():
    (problem,) = grown(series(lives=30), all_judged=True)
    assert problem.startswith("trainer-0 was not judged: ") and grown(series(), all_judged=True) == []


def test_processes_that_are_replaced_by_design_are_judged_together():
    """Each lives for a minute and takes what it takes; what all of them take must not become more and more."""

    def problems(mb):
        rows = series(lives=30, role="verifier", mb=mb)
        steps = [float(i) for i in range(len(rows))]
        return soak.growth_problems(soak.growth(rows, steps, soak.RENEWED), all_judged=True)

    def one(t):
        return 20.0 + min(t % 60, 5) * 10

    assert problems(one) == []
    (problem,) = problems(lambda t: one(t) + t / 60)
    assert problem.startswith("verifier grew from ")


def test_growth_is_one_of_the_problems_that_the_soak_ends_with(monkeypatch, tmp_path):
    """Of a run in which all else is right."""
    (tmp_path / "summary.json").write_text('{"steps": 1800}')
    run = types.SimpleNamespace(workdir=tmp_path)
    done = soak.Soak(run, 0, None)
    done.over = True
    done.steps, done.series = [float(i) for i in range(1800)], series(fds=lambda t: 60 + t // 20)
    rows = "".join(json.dumps({"version": i, "groups": []}) + "\n" for i in range(1800))
    (tmp_path / "trained.jsonl").write_text(rows)
    for check in ("ledger_problems", "summary_problems", "secrets"):
        monkeypatch.setattr(judge, check, lambda *_, **__: [])
    monkeypatch.setattr(judge, "newest_state", lambda workdir: STATE)
    options = types.SimpleNamespace(minutes=30.0, seed=0)
    (problem,) = soak.result(done, 1800, options)["problems"]
    assert "fds in 899 updates" in problem


def test_whatever_ends_a_soak_too_early_is_a_problem_and_its_figures_stay(monkeypatch, tmp_path):
    """Half an hour must not be lost because the launcher did not take SIGINT at its end."""

    def wait(seconds):
        raise subprocess.TimeoutExpired("launcher", seconds)

    signals, killed = [], []
    launcher = types.SimpleNamespace(send_signal=signals.append, wait=wait)
    tmp_path.chmod(0o700)
    (tmp_path / "trained.jsonl").write_text("".join(json.dumps({"version": i, "groups": []}) + "\n" for i in range(9)))
    run = types.SimpleNamespace(workdir=tmp_path, launcher=launcher, kill=lambda: killed.append(1))
    done = soak.Soak(run, 0, (3.0, 12.0))
    done.one_step = lambda: None
    done.spend = lambda seconds: done.steps.extend(float(i) for i in range(9))
    steps = done.live(1.0, extra=8)
    assert killed and signals and steps == 9
    found = soak.result(done, steps, types.SimpleNamespace(minutes=30.0, seed=0))
    timed_out, unfinished = found["problems"]
    assert timed_out.startswith("TimeoutExpired: ") and "did not come to its end" in unfinished
    assert found["steps"] == 9 and len(found["trained"]) == 9


def test_the_page_says_what_was_run_and_who_was_judged(tmp_path):
    roles = soak.growth(series() + series(lives=30, role="rollout-0"), [float(i) for i in range(1800)])
    found = {
        "date": "2026-01-02", "code": "commit abc", "load_at_end": 1.5, "minutes": 30.0, "seed": 1,
        "every": (3.0, 12.0),
        "kills": {"trainer": 2, "rewards": 5}, "steps": 90, "steps_made_again": 3, "samples": 5760,
        "samples_per_second": 20.5, "epochs_finished": 2, "groups_by_lag": {0: 7, 4: 83}, "bound": 4, "quarantined": 0,
        "late_or_duplicate_results_refused": 1, "longest_end_after_launcher_killed": 0.0, "roles": roles,
        "problems": [],
    }  # fmt: skip
    page, (begin, end), (other, _) = tmp_path / "page.md", soak_page.MARKS[True], soak_page.MARKS[False]
    page.write_text(f"before\n{begin}\nold\n{end}\n{other} quiet")
    soak_page.write(found, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{other} quiet") and "old" not in text
    assert "2026-01-02, commit abc, " in text and "seed 1. Nothing was wrong." in text
    assert "| killed: rewards | 5 |\n| killed: trainer | 2 |\n" in text and "| 90 (3) |" in text
    ends = [line.rpartition(" | ")[2] for line in text.splitlines() if line.startswith(("| trainer-0", "| rollout-0"))]
    assert ends == ["no |", "yes |"]
