"""The soak tool for half a minute, and the accounts that it ends with: each kind of mistake is named."""

import dataclasses
import json

import pytest
from whole_runs import ROOT, python

from areal_jax.controller.ledger import CONSUMED, OPEN
from areal_jax.controller.snapshot import CoreState, FinishedState, LedgerState, PromptState
from tools import accounts


@pytest.mark.slow
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
TRAINED = [
    accounts.Trained(version, float(version), [[2 * version + i, epoch, record, 4, version - i, 7] for i, record in at])
    for version, epoch, at in [
        (0, 0, [(0, 3), (0, 1)]), (1, 0, [(0, 0), (1, 2)]), (2, 0, [(0, 5), (1, 4)]), (3, 0, [(0, 6), (1, 7)]),
        (4, 1, [(0, 2), (1, 6)]),
    ]
]  # fmt: skip
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


def problems(lines=TRAINED, state=STATE, steps=5):
    return accounts.problems(lines, state, steps=steps, bound=1, group_size=4)


def changed(version, groups):
    return [dataclasses.replace(line, groups=groups) if line.version == version else line for line in TRAINED]


def replaced(struct, **values):
    return type(struct)(**({name: getattr(struct, name) for name in struct.__struct_fields__} | values))


def test_right_accounts_are_right_and_what_was_given_up_does_not_count():
    assert problems() == []
    given_up = [*TRAINED[:3], *changed(3, [[9, 0, 6, 4, 3, 0], [9, 0, 6, 4, 3, 0]])[3:4], *TRAINED[3:], TRAINED[4]]
    assert problems([*given_up[:4], *TRAINED[2:]]) == []  # step 3 was taken, lost with the trainer, and taken again
    assert problems([*TRAINED, dataclasses.replace(TRAINED[4], version=5)]) == []  # beyond the end


def test_each_mistake_is_named():
    (twice, *_) = problems(changed(2, [[4, 0, 5, 4, 2, 0], [5, 0, 6, 4, 2, 0]]))
    assert twice == "record 6 of epoch 0 was trained on 2 times"
    assert problems(changed(4, [[8, 1, 2, 4, 4, 0], [9, 1, 6, 4, 2, 0]])) == [
        "step 4 trained on version 2 (group 9); the bound is 1"
    ]
    assert problems(changed(4, [[8, 1, 2, 4, 4, 0], [9, 1, 6, 3, 4, 0]])) == [
        "step 4 trained on 3 of 4 samples of group 9"
    ]
    assert problems(state=replaced(STATE, inflight=[])) == ["lost, neither trained on nor waiting: [(1, 0)]"]
    again = replaced(LEDGER, again=[PromptState(1, 5, -1)])
    assert problems(state=replaced(STATE, ledger=again)) == ["record 5 of epoch 1 waits 2 times"]
    assert "epoch 1: the ledger and the trainer differ on records [6]" in problems(changed(4, [[8, 1, 2, 4, 4, 0]]))
    assert "no batch is known for steps [5]" in problems(steps=6)
    assert problems(changed(1, [[2, 0, 0, 4, 1, 0]]))[0].startswith("epoch 0: 7 prompts were trained on; the ledger")
