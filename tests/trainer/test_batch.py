"""From groups to advantages and minibatches, what is refused before a run starts, and what a report warns of."""

import dataclasses

import jax
import ml_dtypes
import msgspec
import numpy as np
import pytest

from areal_jax.trainer import advantages, batch, guards, learner, measure, objectives
from tests.trainer import toy


def estimator(name="group_relative", groups=4, samples=16, **args):
    return advantages.AdvantageEstimator(name, args, groups, samples, 64)


def test_advantages_are_relative_to_the_group_also_in_ragged_ones():
    groups = toy.make_groups(np.random.default_rng(5), ragged=True)
    made = batch.make_batch(groups, 0, estimator())
    values = np.array([s.advantages for s in made.samples])
    start = 0
    for g, group in enumerate(groups):
        rewards = np.array([t.reward for sample in group.samples for t in sample])
        spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        expected = (rewards - rewards.mean()) / (spread + 1e-6) if np.ptp(rewards) else np.zeros(len(rewards))
        here = slice(start, start + len(rewards))
        np.testing.assert_allclose(values[here], expected, atol=1e-5)
        assert (made.group_ids[here] == g).all()
        start += len(rewards)
    assert len(made.samples) == start


@pytest.mark.parametrize("name", sorted(advantages.ESTIMATORS))
def test_every_estimator_gives_each_sample_its_own(name):
    groups = toy.make_groups(np.random.default_rng(2))
    made = batch.make_batch(groups, 0, estimator(name))
    better = [s for s, t in zip(made.samples, (t for g in groups for x in g.samples for t in x)) if t.reward > 0]
    worse = [s for s, t in zip(made.samples, (t for g in groups for x in g.samples for t in x)) if t.reward == 0]
    for s in made.samples:
        assert np.isfinite(s.advantages).all()
        assert np.ndim(s.advantages) == 0 or len(s.advantages) == len(s.tokens)

    def mean(samples):
        return np.mean([np.broadcast_to(s.advantages, len(s.tokens))[s.mask].mean() for s in samples])

    assert mean(better) > mean(worse)
    of_tokens = [np.abs(np.broadcast_to(s.advantages, len(s.tokens))[s.mask]).mean() for s in made.samples]
    assert made.report["advantage/abs_mean"] == pytest.approx(np.mean(of_tokens), rel=1e-5)


def test_a_group_without_a_trained_token_leaves_the_others_theirs():
    groups = toy.make_groups(np.random.default_rng(5), groups=3)
    expected = batch.make_batch(groups, 0, estimator(groups=3)).samples
    nothing = toy.make_groups(np.random.default_rng(6), groups=1)[0]
    nothing.samples[:] = [[msgspec.structs.replace(t[0], loss_mask=t[0].loss_mask & False)] for t in nothing.samples]
    made = batch.make_batch([groups[0], nothing, *groups[1:]], 0, estimator(groups=3)).samples
    assert [s.advantages for s in made] == [s.advantages for s in expected] and any(s.advantages for s in made[-4:])


def test_a_batch_that_is_too_old_or_from_the_future_is_refused():
    groups = toy.make_groups(np.random.default_rng(0), version=4, lags=(0, 2))
    assert batch.make_batch(groups, 4, estimator(), max_staleness=2).report["staleness/max"] == 2
    with pytest.raises(batch.StalenessError, match=r"2 behind version 4, and controller\.max_staleness is 1"):
        batch.make_batch(groups, 4, estimator(), max_staleness=1)
    with pytest.raises(batch.StalenessError, match="but the trainer is at 3"):
        batch.make_batch(groups, 3, estimator(), max_staleness=9)


def test_minibatches_keep_groups_whole_and_depend_on_seed_and_version_alone():
    made = batch.make_batch(toy.make_groups(np.random.default_rng(0), groups=8), 0, estimator(groups=8, samples=32))
    made = dataclasses.replace(
        made, samples=[dataclasses.replace(s, advantages=float(g)) for s, g in zip(made.samples, made.group_ids)]
    )
    parts = batch.split(made, 3, seed=1)
    groups = [{s.advantages for s in part} for part in parts]
    assert sorted(map(len, groups)) == [2, 3, 3] and set.union(*groups) == set(range(8))
    assert sum(map(len, groups)) == 8
    again = batch.split(made, 3, seed=1)
    assert [[s.advantages for s in p] for p in again] == [[s.advantages for s in p] for p in parts]
    later = batch.split(dataclasses.replace(made, version=1), 3, seed=1)
    assert [{s.advantages for s in p} for p in later] != groups


def test_where_there_are_fewer_groups_than_minibatches_none_is_empty():
    """An update without a gradient would still move the parameters, by its moments."""
    made = batch.make_batch(toy.make_groups(np.random.default_rng(0), groups=2), 0, estimator(groups=2, samples=8))
    assert sorted(map(len, batch.split(made, 4, seed=1))) == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, r"trainer.objective='ppo' is unknown; known: decoupled_ppo, ppo_clip"),
        (
            {"objective_args": {"clip": 1}},
            "objective_args clip: 'decoupled_ppo' has no such argument; it takes clip_low",
        ),
        ({"objective": "aipo"}, "objective_args lacks ratio_max, which 'aipo' requires"),
        ({"correction": "tis"}, "would weigh by the behaviour policy twice: 'decoupled_ppo' already does"),
        ({"objective": "cispo", "correction": "icepop"}, "would weigh by the behaviour policy twice: 'cispo'"),
        ({"correction": "m2po", "proximal": "fused"}, "sees the whole batch: it needs proximal='recompute'"),
        ({"correction_args": {"cap": 2.0}}, "correction_args is set but trainer.correction is 'none'"),
        ({"objective_args": {"clip_high": "0.2"}}, r"objective_args=\{'clip_high': '0.2'\} cannot be computed with: "),
        ({"objective_args": {"cap_mode": "cut"}}, "cannot be computed with: cap_mode='cut' is not one of 'mask'"),
        ({"correction": "m2po", "correction_args": {"budget": "x"}}, r"correction_args=\{'budget': 'x'\} cannot"),
        ({"aggregate": "mean"}, "trainer.aggregate='mean' is unknown; known: token_mean"),
        ({"proximal": "fused", "minibatches": 2}, "exact with one minibatch only, and trainer.minibatches=2"),
        ({"proximal": "ema"}, "trainer.proximal='ema' is unknown"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings, message):
    with pytest.raises(objectives.ObjectiveError, match=message) as error:
        learner.make_objective(toy.settings(**({"proximal": "recompute"} | settings)))
    assert "\n" not in str(error.value)


def test_advantage_and_mesh_settings_are_checked():
    with pytest.raises(ValueError, match=r"trainer\.advantage='grpo' is unknown; known: group_relative"):
        advantages.check("grpo", {})
    with pytest.raises(ValueError, match="advantage_args std: 'group_relative' has no such argument; it takes scale"):
        advantages.check("group_relative", {"std": 1})
    with pytest.raises(ValueError, match=r"advantage_args=\{'scale': 'mean'\} cannot be computed with: scale='mean'"):
        advantages.check("group_relative", {"scale": "mean"})
    for name in advantages.ESTIMATORS:
        advantages.check(name, {})
    with pytest.raises(objectives.ObjectiveError, match="does not fit 8 devices"):
        learner.mesh_of(toy.settings(data_parallel=3, fsdp=1))
    with pytest.raises(objectives.ObjectiveError, match=r"trainer\.rows=6 must be a multiple"):
        learner.mesh_of(toy.settings(rows=6))


def report_of(mean, worst, kl):
    probabilities = {"mismatch/prob_diff_mean": 0.0, "mismatch/prob_abs_diff_mean": mean}
    logprobs = {"mismatch/logprob_abs_diff_mean": mean, "mismatch/logprob_abs_diff_max": worst, "mismatch/kl": kl}
    return logprobs | probabilities


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (report_of(2e-5, 1e-4, 0.0), None),
        (report_of(0.02, 0.1, 0.0001), "lower precision"),
        (report_of(0.02, 0.1, 0.015), "sampling transformation"),
        (report_of(0.02, 3.0, 0.0001), "wrong version stamp"),
        (report_of(1.2, 6.0, 1.0), "other weights"),
        (report_of(float("nan"), float("inf"), 0.0), "not finite"),
    ],
)
def test_a_mismatch_is_reported_with_its_likely_cause(found, cause):
    warning = measure.diagnose(found, compute_dtype="float32")
    assert (cause in warning) if cause else warning == ""


def test_where_the_engine_is_told_to_sample_from_a_part_a_direction_is_no_fault():
    tilted, rounded = report_of(0.02, 0.1, 0.015), report_of(0.02, 0.1, 0.0001)
    assert measure.diagnose(tilted, compute_dtype="float32", restricted=True) == ""
    assert "lower precision" in measure.diagnose(rounded, compute_dtype="float32", restricted=True)


def disagreement(cause, tokens=4000, vocabulary=64):
    """[N] log-probs that trainer and engine give to N sampled tokens when one thing is wrong at the engine."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 2.0, (tokens, vocabulary)).astype(np.float32)

    def softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    trainer = engine = softmax(logits)
    drawn_from = trainer
    if cause == "temperature":
        engine = drawn_from = softmax(logits / 0.9)
    elif cause == "processed":  # top-p 0.8 is applied, and the log-probs of before are reported
        order = np.argsort(-trainer, axis=1)
        mass = np.cumsum(np.take_along_axis(np.exp(trainer), order, 1), 1)
        kept = np.zeros_like(trainer, bool)
        np.put_along_axis(kept, order, mass - np.take_along_axis(np.exp(trainer), order, 1) < 0.8, 1)
        drawn_from = trainer = softmax(np.where(kept, logits, -1e9))
    elif cause == "head":
        engine = drawn_from = softmax(logits.astype(ml_dtypes.bfloat16).astype(np.float32))
    elif cause == "stale":  # at an update, one token in a hundred is of other logits
        other = rng.normal(0.0, 2.0, (tokens, vocabulary)).astype(np.float32)
        engine = drawn_from = softmax(np.where(np.arange(tokens)[:, None] % 100 == 0, other, logits))
    draw = np.argmax(drawn_from + rng.gumbel(size=logits.shape), axis=1)[:, None]
    return tuple(np.take_along_axis(x, draw, 1)[:, 0] for x in (trainer, engine))


@pytest.mark.parametrize(
    ("cause", "named"),
    [
        ("nothing", ""),
        ("temperature", "temperature"),
        ("processed", "not the processed ones"),
        ("head", "lower precision (of the engine, its head"),
        ("stale", "caches that outlived their weights"),
    ],
)
def test_what_is_really_wrong_is_the_cause_that_is_named(cause, named):
    record = measure.Recorder()
    trainer, engine = disagreement(cause)
    fresh = np.ones(len(engine), bool)
    record.mismatch(trainer, engine, fresh, ~fresh)
    report = measure.finish(jax.device_get(record.sums))
    assert 0.9 < report["mismatch/ess"] < 1.0 + 1e-5
    warning = measure.diagnose(report, compute_dtype="float32")
    assert named in warning and bool(warning) == bool(named), warning


def test_the_guard_names_steps_without_anything_to_learn(tmp_path):
    guard = guards.Guard(tmp_path, action="stop", equal_rewards_limit=2)
    flat = {"reward/equal_groups": 1.0, "reward/mean": 0.0}
    assert guard.judge(1, flat, []) == ""
    assert guard.judge(2, {"reward/equal_groups": 0.5}, []) == ""
    assert guard.judge(3, flat, []) == ""
    with pytest.raises(guards.TrainingStopped, match=r"for 2 steps all rewards.*version-4\.npz"):
        guard.judge(4, flat, [])
    assert (tmp_path / "postmortem" / "version-4.npz").stat().st_mode & 0o077 == 0
