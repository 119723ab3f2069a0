"""Promise 3: η = 0 is synchronous RL, bit for bit, though it runs the same asynchronous system."""

import json

import pytest
from whole_runs import ROOT, launch, python, steps

SMALL = {
    "controller__batch_size": 8, "controller__group_size": 4, "controller__max_staleness": 0, "data__eval": "",
    "trainer__steps": 4, "trainer__rows": 8, "trainer__learning_rate": 1e-3, "trainer__warmup_steps": 1,
    "rollout__slots": 16, "trainer__eval_every": 0,
}  # fmt: skip


TWO_WORKERS = {"rollout__workers": 2, "trainer__minibatches": 2, "trainer__proximal": "recompute"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, TWO_WORKERS], ids=["one_worker", "two_workers_two_minibatches"])
def test_eta_0_equals_a_plain_synchronous_loop(tmp_path, variant):
    summary = launch(tmp_path / "run", **SMALL, **variant)
    assert summary["max_staleness"] == 0 and summary["recompiles_after_warmup"] == 0
    done = python(ROOT / "tests/integration/plain_loop.py", tmp_path / "run", tmp_path / "plain", timeout=300)
    assert done.returncode == 0

    plain = json.loads((tmp_path / "plain" / "steps.json").read_text())
    ours = steps(tmp_path / "run")
    assert len(plain) == len(ours) == 4
    for a, b in zip(ours, plain, strict=True):
        for name in ("actor/loss", "actor/grad_norm", "reward/mean", "batch/trained_tokens", "actor/entropy"):
            assert a[name] == b[name], name
    assert any(row["reward/std"] > 0 for row in ours)
    weights = [(tmp_path / folder / "export" / "model.safetensors").read_bytes() for folder in ("run", "plain")]
    assert weights[0] == weights[1]
