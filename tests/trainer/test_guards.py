"""Guards on the training itself: which updates are not applied, what is said of them, and what is kept."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax._aggregate import Weighted
from areal_jax.trainer import guards, packing, steps


def minibatch(loss=0.5, ratio=1.5, mismatch=0.01, tokens=10):
    return {
        "mean": {
            "actor/loss": Weighted(jnp.float32(loss), jnp.float32(1.0)),
            "mismatch/logprob_abs_difference": Weighted(jnp.float32(tokens * mismatch), jnp.float32(tokens)),
        },
        "max": {"is/max": jnp.float32(ratio)},
    }


def good(limits=None, *, norm=1.0, before=None, **measured):
    sums, before = minibatch(**measured), before or minibatch(tokens=0)
    return bool((limits or steps.Limits()).good(jnp.float32(norm), sums, before))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["norm", "loss"])
def test_what_is_not_finite_is_never_applied(name, value):
    assert not good(**{name: value})


@pytest.mark.parametrize(("limit", "name"), [("grad_norm", "norm"), ("ratio", "ratio"), ("mismatch", "mismatch")])
def test_each_limit_holds_at_its_own_measure_and_only_if_set(limit, name):
    limits = steps.Limits(**{limit: 2.0})
    assert good(limits, **{name: 1.99}) and not good(limits, **{name: 2.01})
    assert good(**{name: 1e6})


def test_a_bad_minibatch_condemns_the_next_by_the_engines_mismatch_alone():
    bad = minibatch(loss=math.nan, ratio=1e6, mismatch=1.0)
    assert good(before=bad) and good(steps.Limits(ratio=2.0), before=bad)
    assert not good(steps.Limits(mismatch=0.5), before=bad, tokens=0)  # only the first one's tokens were measured
    assert good(steps.Limits(mismatch=0.5), before=bad, tokens=100)


BAD = {"actor/skipped_updates": 1.0, "actor/loss": 0.3, "actor/grad_norm": 1e4, "is/max": 70.0}


def packed():
    arrays = {"tokens": np.arange(8, dtype=np.int32).reshape(2, 4)}
    part = object.__new__(packing.Packed)
    object.__setattr__(part, "arrays", arrays)
    return part


def test_a_skipped_update_is_named_counted_and_its_batch_is_kept_for_its_owner(tmp_path):
    guard = guards.Guard(tmp_path, action="skip", keep=2)
    said = [guard.judge(version, BAD, [packed()]) for version in (4, 5, 6)]
    assert "gradient norm 1e+04" in said[0] and "largest importance weight 70" in said[0]
    assert "beyond trainer.grad_norm_limit, ratio_limit or mismatch_limit" in said[0]
    assert "2 updates were not applied" in guard.judge(7, BAD | {"actor/skipped_updates": 2.0}, [])
    assert guard.skipped == 5 and guard.judge(7, {"actor/skipped_updates": 0.0}, []) == ""
    folder = tmp_path / "postmortem"
    assert sorted(path.name for path in folder.glob("*.npz")) == ["version-4.npz", "version-5.npz"], "no more than keep"
    np.testing.assert_array_equal(np.load(folder / "version-4.npz")["0/tokens"], packed().arrays["tokens"])
    assert json.loads((folder / "version-4.json").read_text())["is/max"] == "70.0"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (BAD, "beyond trainer.grad_norm_limit"),
        (BAD | {"actor/loss": math.nan}, "its loss or gradient is not finite"),
        (BAD | {"actor/grad_norm": math.inf}, "its loss or gradient is not finite"),
    ],
)
def test_told_to_stop_it_ends_the_run_and_says_where_the_batch_is(tmp_path, report, words):
    with pytest.raises(guards.TrainingStopped, match=rf"step to version 3: .*{words}.*version-3\.npz"):
        guards.Guard(tmp_path, action="stop").judge(3, report, [packed()])
