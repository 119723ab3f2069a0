"""Gradients do not depend on how a batch is laid out; updates are those of a plain implementation in other terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models import logprobs
from areal_jax.trainer import measure, objectives, packing, steps
from areal_jax.trainer.batch import split
from tests.models import tiny
from tests.trainer import toy

ALL = sorted(objectives.OBJECTIVES)
REQUIRED = {"aipo": {"ratio_max": 4.0}, "mirror_descent": {"tau": 0.1}, "spo": {"negative_scale": 0.5}}
CORRECTION_ARGS = {"sequence_is": {"low": 0.5, "high": 2.0}, "opsm": {"delta": 0.1}}


def gradients(the_learner, batch, packed=None):
    """Gradient of the batch's loss as one flat vector, by the learner's own steps but without the update."""
    run, params = the_learner.steps, the_learner.state.params
    packed = packed or the_learner._pack(batch.samples)
    total, sums = run.zero_gradients(params), run.zero_metrics()
    scalars = steps.scalars(packed.num_tokens, packed.num_sequences, batch.version)
    for micro in packed:
        total, sums = run.accumulate(params, total, sums, run.put(micro), scalars, None, None, None)
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(total)])


@pytest.fixture(scope="module")
def packed_learner():
    return toy.make_learner(toy.settings(rows=4))


@pytest.fixture(scope="module")
def batch(packed_learner):
    return toy.on_policy(toy.random_batch(3, version=5, lags=(0, 1, 3), ragged=True), packed_learner, noise=0.3)


@pytest.fixture(scope="module")
def reference_gradient(packed_learner, batch):
    return gradients(packed_learner, batch)


def test_gradients_do_not_depend_on_micro_batching_and_padding(packed_learner, batch, reference_gradient):
    assert np.abs(reference_gradient).max() > 1e-3
    one_row = packing.pack_fixed(batch.samples, sequences=4, row_length=64)
    assert len(one_row) > 1
    np.testing.assert_allclose(gradients(packed_learner, batch, one_row), reference_gradient, rtol=1e-4, atol=2e-6)
    reordered = packing.pack(batch.samples[::-1], rows=4, row_length=64, max_segments=2, shuffle_seed=9)
    np.testing.assert_allclose(gradients(packed_learner, batch, reordered), reference_gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["seq_mean_token_mean", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("name", ["gspo", "asympo"])
def test_sequence_objectives_do_not_depend_on_packing_either(name, aggregate, batch):
    one = toy.make_learner(toy.settings(rows=4, objective=name, aggregate=aggregate))
    expected = gradients(one, batch)
    fixed = packing.pack_fixed(batch.samples, sequences=4, row_length=64)
    np.testing.assert_allclose(gradients(one, batch, fixed), expected, rtol=1e-4, atol=2e-6)
    many = packing.pack(batch.samples, rows=4, row_length=64, max_segments=2, shuffle_seed=3)
    np.testing.assert_allclose(gradients(one, batch, many), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1)], ids=str)
def test_gradients_do_not_depend_on_the_mesh(sizes, batch, reference_gradient):
    axes = dict(zip(("data", "fsdp", "tensor", "expert"), sizes, strict=True))
    mesh = models.make_mesh(jax.devices()[:8], **axes)
    sharded = toy.make_learner(toy.settings(rows=8), mesh=mesh)
    np.testing.assert_allclose(gradients(sharded, batch), reference_gradient, rtol=2e-4, atol=5e-6)
    pending = sharded.step(dataclasses.replace(batch, version=0))
    assert np.isfinite(pending.report()["actor/grad_norm"])
    for before, after in zip(
        jax.tree.leaves(sharded.model.param_shardings()), jax.tree.leaves(sharded.state.params), strict=True
    ):
        assert after.sharding.is_equivalent_to(before, after.ndim)


@pytest.mark.parametrize(
    "name, correction, lora",
    [
        pytest.param("decoupled_ppo", "none", None, marks=pytest.mark.slow),
        pytest.param("sapo", "icepop", None, marks=pytest.mark.slow),
        pytest.param("ppo_clip", "m2po", None, marks=pytest.mark.slow),
        pytest.param("decoupled_ppo", "none", models.Lora(2), marks=pytest.mark.slow),
    ],
)
def test_a_token_level_objective_is_the_same_by_chunks_and_by_rows(name, correction, lora, batch, monkeypatch):
    settings = toy.settings(
        rows=4, objective=name, correction=correction, entropy_coef=0.1, proximal="recompute",
        kl_coef=0.0 if lora else 0.1, lora_rank=lora.rank if lora else 0,
    )  # fmt: skip
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 1)  # several chunks
    made = []
    for by_chunks in (True, False):
        with monkeypatch.context() as patch:
            if not by_chunks:
                patch.setattr(objectives.Objective, "token_level", False)
            one = toy.make_learner(settings, lora=lora)
            assert one.objective.token_level == by_chunks
            report = one.step(dataclasses.replace(batch, version=0)).report()
            report = {n: x for n, x in report.items() if isinstance(x, float)}
            made.append((report, np.concatenate([np.ravel(x) for x in jax.tree.leaves(one.state.params)])))
    (report, params), (expected, expected_params) = made
    assert report == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(params, expected_params, atol=1e-6)


def test_what_looks_at_whole_sequences_is_not_token_level():
    def level(name, **settings):
        return objectives.make(name, REQUIRED.get(name), **settings).token_level

    assert [name for name in ALL if not level(name)] == ["asympo", "gspo", "topr", "vespo"]
    assert not level("ppo_clip", correction="opsm", correction_args={"delta": 0.1})
    assert not level("ppo_clip", aggregate="seq_mean_token_mean")
    assert level("ppo_clip", aggregate="seq_mean_token_sum", correction="tis")


def plain_step(model, params, reference, batch, config):
    """One training step without packing, chunks or optax: a loop over sequences, full logits, AdamW by hand.

    Decoupled PPO (cap 1.5, clip 0.2 and 0.28) in GRPO's mean over sequences, with its penalty inside, and an entropy
    bonus over tokens. Returns the parameters, and the loss and the gradient's norm of every minibatch.
    """

    def scores(params, sample):
        rows = jnp.asarray(sample.tokens, jnp.int32)[None]
        positions = jnp.arange(rows.size, dtype=jnp.int32)[None]
        logits = model.logits(params, rows, positions, jnp.ones_like(rows))[0, :-1]
        normalized = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
        entropy = -jnp.sum(jnp.exp(normalized) * normalized, axis=-1)
        return normalized[jnp.arange(rows.size - 1), rows[0, 1:]], entropy

    both = tiny.jit(lambda *trees: [scores(tree, s)[0] for tree in trees for s in batch.samples])(params, reference)
    count = len(batch.samples)
    fixed = {id(s): (np.asarray(both[i]), np.asarray(both[count + i])) for i, s in enumerate(batch.samples)}

    def loss(params, samples):
        total = 0.0
        for s in samples:
            (proximal, referred), (new, entropy) = fixed[id(s)], scores(params, s)
            weight = np.exp(proximal - s.behavior_logprobs[1:])
            ratio, distance = jnp.exp(new - proximal), referred - new
            surrogate = jnp.minimum(ratio * s.advantages, jnp.clip(ratio, 0.8, 1.28) * s.advantages)
            terms = -np.where(weight > 1.5, 0, weight) * surrogate
            terms += config.kl_coef * (jnp.exp(distance) - distance - 1)
            mask = s.mask[1:].astype(np.float32)
            total += jnp.sum(terms * mask) / np.float32(mask.sum() * len(samples))
            total -= config.entropy_coef * jnp.sum(entropy * mask) / np.float32(sum(x.mask[1:].sum() for x in samples))
        return total

    moments = [jax.tree.map(jnp.zeros_like, params)] * 2
    values, norms = [], []
    for n, part in enumerate(split(batch, config.minibatches, config.seed), 1):
        value, grads = tiny.jit(jax.value_and_grad(lambda params, part=part: loss(params, part)))(params)
        values.append(float(value))
        norms.append(np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))))
        grads = jax.tree.map(lambda g: g * min(1.0, config.max_grad_norm / norms[-1]), grads)
        params, moments = adamw(params, grads, moments, n, config)
    return params, values, norms


def adamw(params, grads, moments, n, config):
    """The n-th update, during warm-up: (parameters, moments)."""
    b1, b2 = config.beta1, config.beta2
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments[0], grads)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, moments[1], grads)
    rate = config.learning_rate * n / (config.warmup_steps * config.minibatches)

    def updated(path, p, m, v):
        step = m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + config.epsilon)
        if "norm" not in str(path[-1]) and "bias" not in str(path[-1]):
            step = step + config.weight_decay * p
        return p - rate * step

    return jax.tree_util.tree_map_with_path(updated, params, first, second), [first, second]


@pytest.mark.slow
def test_a_step_equals_a_plain_implementation():
    config = toy.settings(
        rows=4, minibatches=2, proximal="recompute", objective_args={"weight_cap": 1.5, "clip_high": 0.28}, kl_coef=0.3,
        entropy_coef=0.05, aggregate="seq_mean_token_mean", weight_decay=0.1, max_grad_norm=0.5, learning_rate=1e-2,
        warmup_steps=1,
    )  # fmt: skip
    the_learner = toy.make_learner(config, layers=1)
    few = toy.on_policy(toy.random_batch(11, groups=2, samples=2, lengths=(12, 13)), the_learner, noise=0.4)
    uneven = [dataclasses.replace(s, mask=s.mask & (np.arange(12) < 6 + 2 * i)) for i, s in enumerate(few.samples)]
    few = dataclasses.replace(few, samples=uneven)
    params = jax.tree.map(jnp.copy, the_learner.state.params)
    the_learner.reference = jax.tree.map(lambda x: 1.05 * x, params)
    expected, values, norms = plain_step(the_learner.model, params, the_learner.reference, few, config)
    report = the_learner.step(few).report()
    assert report["actor/loss"] == pytest.approx(np.mean(values), rel=1e-4)
    assert report["actor/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert 0 < report["is/masked_frac"] < 0.5 and abs(report["actor/ppo_kl"]) > 1e-5
    for want, got, before in zip(
        jax.tree.leaves(expected), jax.tree.leaves(the_learner.state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(got - before, want - before, rtol=2e-3, atol=4e-6)


@pytest.mark.parametrize("name", ALL)
def test_every_objective_and_its_gradient_are_finite(name):
    """All by name, on arrays with hard corners: masked rows, stale tokens, equal and extreme log-probs."""
    rng = np.random.default_rng(0)
    shape = (3, 16)
    made = objectives.make(name, REQUIRED.get(name), proximal="loglinear", num_segments=4)
    segments = np.minimum(np.arange(16) // 5 + 1, 3) * np.ones((3, 1), np.int32)
    micro = {
        "mask": (rng.random(shape) > 0.3) & (np.arange(3) < 2)[:, None],
        "behavior_logprobs": -rng.uniform(0, 9, shape).astype(np.float32),
        "advantages": rng.normal(size=shape).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "versions": np.full(shape, 2, np.int32),
    }
    logprobs = jnp.asarray(-rng.uniform(0, 9, shape), jnp.float32).at[0, 0].set(0.0)
    given = (jnp.ones(shape), micro, steps.scalars(20, 6, 4), None, None, None)
    (loss, _), grad = jax.value_and_grad(lambda x: made.loss(x, *given), has_aux=True)(logprobs)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0
    assert not np.asarray(grad)[~micro["mask"]].any()


def hand_made(name, args=None, reference=(1, 1, 1, 1), **options):
    """(loss, report) of sequences of three tokens and of one, A = 1, ratios to behaviour 2, 1/2, 3 and 3, repeated and
    padded to the shapes of the test above, which compiled them."""
    made = objectives.make(name, args, proximal="fused", num_segments=4, **options)

    def rows(values, dtype=np.float32):
        return np.tile(np.array([*values, *[0] * 8], dtype), (3, 1))

    behavior, mask = rows([-5] * 8), rows([1] * 8, bool)
    micro = {"mask": mask, "behavior_logprobs": behavior, "advantages": rows([1] * 8)}
    micro |= {"versions": rows([3] * 8, np.int32), "segment_ids": rows([1, 1, 1, 2, 3, 3, 3, 4], np.int32)}
    current = jnp.asarray(behavior + rows(np.log([2, 0.5, 3, 3, 2, 0.5, 3, 3])))
    reference = current + rows(np.log([*reference, *reference])) if made.kl_coef else None
    loss, sums = made.loss(current, jnp.ones_like(current), micro, steps.scalars(24, 12, 3), None, reference, None)
    return float(loss), measure.finish(jax.device_get(sums))


def test_what_the_clip_and_the_cap_are_said_to_hold_is_what_they_hold():
    def held(*given):
        return hand_made(*given)[1]["actor/clip_fraction"]

    assert held("ppo_clip") == 0.75  # the tokens of 2, 3 and 3
    assert held("ppo_clip", {"clip_high": 1.5}) == 0.5
    assert held("gspo", {"clip_high": 0.5}) == 0.25  # the geometric means are 3^(1/3) = 1.44, and 3
    for mode, share in (("mask", 0.5), ("clamp", None)):  # what is clamped is not left out
        report = hand_made("decoupled_ppo", {"weight_cap": 2.5, "cap_mode": mode})[1]
        assert report.get("is/masked_frac") == share and report["is/max"] == pytest.approx(3)


@pytest.mark.parametrize(("aggregate", "share"), [("token_mean", 1 / 4), ("seq_mean_token_mean", 1 / 3 / 2)])
def test_the_penalty_to_the_reference_is_aggregated_as_the_loss_is(aggregate, share):
    """As in GRPO, where it stands inside the mean over a response's tokens."""
    # k3 = 2 - 1 - log 2 at one token of the longer sequence
    with_it, report = hand_made("reinforce", reference=(2, 1, 1, 1), kl_coef=1.0, aggregate=aggregate)
    assert report["actor/ref_kl"] == pytest.approx((1 - np.log(2)) / 4, rel=1e-5)
    without = hand_made("reinforce", aggregate=aggregate)[0]
    assert with_it - without == pytest.approx((1 - np.log(2)) * share, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_objective_trains_one_step(name):
    c = toy.settings(objective=name, objective_args=REQUIRED.get(name, {}))
    the_learner = toy.make_learner(c, width=16, layers=1, heads=2)
    before = [np.asarray(x) for x in jax.tree.leaves(the_learner.state.params)]
    batch = toy.on_policy(toy.random_batch(4), the_learner, noise=0.1)
    report = the_learner.step(batch).report()
    assert np.isfinite(report["actor/loss"]) and report["actor/grad_norm"] > 0 and report["actor/skipped_updates"] == 0
    after = [np.asarray(x) for x in jax.tree.leaves(the_learner.state.params)]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(objectives.CORRECTIONS) - {"none"}))
def test_every_correction_trains_one_step_and_reports_what_it_drops(name):
    settings = toy.settings(
        objective="ppo_clip", correction=name, correction_args=CORRECTION_ARGS.get(name, {}), proximal="recompute"
    )
    the_learner = toy.make_learner(settings, width=16, layers=1, heads=2)
    batch = toy.on_policy(toy.random_batch(4), the_learner, noise=1.0)
    report = the_learner.step(batch).report()
    assert report["actor/grad_norm"] > 0
    assert 0 <= report["is/masked_frac"] < 1


def test_the_first_steps_kl_is_exactly_zero_when_fused(packed_learner, batch):
    the_learner = toy.renew(packed_learner)
    report = the_learner.step(dataclasses.replace(batch, version=0)).report()
    assert report["actor/ppo_kl"] == 0.0
    assert report["actor/clip_fraction"] == 0.0


@pytest.mark.slow
def test_recomputed_proximal_log_probs_equal_the_fused_ones():
    made = {}
    for mode in ("fused", "recompute"):
        one = toy.make_learner(toy.settings(proximal=mode, kl_coef=0.05, entropy_coef=0.01))
        batch = toy.on_policy(toy.random_batch(6, lags=(0,)), one, noise=0.2)
        report = one.step(batch).report()
        made[mode] = (report, np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(one.state.params)]))
    for name, value in made["fused"][0].items():
        if isinstance(value, float):
            assert made["recompute"][0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    np.testing.assert_allclose(made["recompute"][1], made["fused"][1], atol=1e-6)


@pytest.mark.parametrize("correction", ["", pytest.param("m2po", marks=pytest.mark.slow)])
def test_nothing_recompiles_over_batches_of_every_shape(packed_learner, correction):
    """Nor for a correction that looks at all tokens of a minibatch, of which there are more or fewer."""
    one = {"objective": "ppo_clip", "proximal": "recompute", "correction": correction, "rows": 1}
    the_learner = toy.make_learner(toy.settings(**one)) if correction else toy.renew(packed_learner)
    the_learner.warm_up(samples=32)
    estimator = toy.AdvantageEstimator("group_relative", {}, 8, 32, 64)
    toy.random_batch(0, groups=8, samples=4, estimator=estimator)
    counter = steps.CompileCounter()
    for seed in range(12):
        batch = toy.random_batch(
            seed, version=seed, groups=1 + seed % 8, ragged=seed % 2 == 0, lengths=(5 + seed, 6 + 5 * seed),
            lags=range(1 + min(seed, 3)), estimator=estimator,
        )  # fmt: skip
        the_learner.step(batch).report()
    assert counter.count == 0
    jax.jit(lambda x: x * 3.25)(1.5)
    assert counter.count > 0  # it can count


def test_a_bad_update_is_skipped_and_counted(packed_learner):
    the_learner = toy.renew(packed_learner)
    good = toy.random_batch(1)
    bad = dataclasses.replace(
        good, samples=[dataclasses.replace(good.samples[0], advantages=float("nan")), *good.samples[1:]]
    )
    before = [np.asarray(x) for x in jax.tree.leaves((the_learner.state.params, the_learner.state.opt_state))]
    report = the_learner.step(bad).report()
    assert report["actor/skipped_updates"] == 1.0
    after = [np.asarray(x) for x in jax.tree.leaves((the_learner.state.params, the_learner.state.opt_state))]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert the_learner.version == int(the_learner.state.version) == 1  # the batch is consumed all the same
    assert the_learner.step(dataclasses.replace(good, version=1)).report()["actor/skipped_updates"] == 0.0
    applied = [np.asarray(x) for x in jax.tree.leaves(the_learner.state.params)]

    # As one step's minibatches: a bad one does not condemn the next.
    the_learner = toy.renew(packed_learner)
    minibatches = [the_learner._pack(b.samples) for b in (bad, bad, good)]
    report = the_learner._run(bad, minibatches, lambda: None, apply=True).report()
    assert report["actor/skipped_updates"] == 2.0
    for a, b in zip(applied, jax.tree.leaves(the_learner.state.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("proximal", ["recompute", "loglinear"])
def test_several_minibatches_move_away_from_the_proximal_policy(proximal):
    settings = toy.settings(minibatches=3, proximal=proximal, learning_rate=3e-3)
    the_learner = toy.make_learner(settings)
    batch = toy.on_policy(toy.random_batch(8, groups=6, samples=4), the_learner)
    report = the_learner.step(batch).report()
    assert int(the_learner.state.version) == 1
    assert int(the_learner.state.opt_state[0].count) == 3
    assert report["mismatch/logprob_abs_diff_mean"] < 1e-5  # measured under the parameters before the step
    assert abs(report["actor/ppo_kl"]) > 1e-6
