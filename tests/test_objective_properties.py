"""What every loss and correction promises: one answer packed, padded, in micro-batches, on 1 and on 8 devices; jit,
vmap and grad; finite whatever masked places and extreme log-probs hold; errors that name the argument."""

import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from areal_jax import advantages, corrections, losses
from tests.models import tiny

PPO = ("logprobs", "old_logprobs", "advantages", "mask")
OFF_POLICY = ("logprobs", "behavior_logprobs", "advantages", "mask")

# name -> (arguments in positional order, keywords, does it look at whole sequences)
LOSSES = {
    "importance_log_ratio": (("logprobs", "old_logprobs", "mask"), {}, False),
    "ppo_clip_loss": (PPO, {"dual_clip": 3.0}, False),
    "decoupled_ppo_loss": (
        ("logprobs", "proximal_logprobs", "behavior_logprobs", "advantages", "mask"), {"weight_cap": 5.0}, False,
    ),
    "reinforce_loss": (("logprobs", "advantages", "mask"), {}, False),
    "cispo_loss": (OFF_POLICY, {}, False),
    "aipo_loss": (OFF_POLICY, {"ratio_max": 2.0}, False),
    "gspo_loss": (PPO, {"clip_low": 0.2, "clip_high": 0.2}, True),
    "topr_loss": (OFF_POLICY, {}, True),
    "vespo_loss": (OFF_POLICY, {}, True),
    "sapo_loss": (PPO, {}, False),
    "mirror_descent_loss": (PPO, {"tau": 0.1}, False),
    "asympo_loss": (("logprobs", "advantages", "mask"), {}, True),
    "scaled_policy_loss": (("logprobs", "advantages", "mask"), {"negative_scale": 0.5}, False),
    "kl_penalty": (("logprobs", "ref_logprobs", "mask"), {}, False),
    "value_loss": (("logprobs", "old_logprobs", "behavior_logprobs", "mask"), {"clip": 0.2}, False),
}  # fmt: skip
CORRECTIONS = {
    "tis_weights": (("logprobs", "behavior_logprobs", "mask"), {}, False),
    "icepop_weights": (("logprobs", "behavior_logprobs", "mask"), {}, False),
    "sequence_is_mask": (("logprobs", "behavior_logprobs", "mask"), {"low": 0.9, "high": 1.1}, True),
    "opsm_mask": (OFF_POLICY, {"delta": 0.05}, True),
    "dppo_mask": (OFF_POLICY, {"delta_low": 0.05, "delta_high": 0.05}, False),
    "m2po_mask": (OFF_POLICY, {}, False),
    "m2po_all_tokens_mask": (("logprobs", "behavior_logprobs", "mask"), {}, False),
}
ALL = LOSSES | CORRECTIONS
SEQUENCE = [name for name in ALL if ALL[name][2]]
MODES = {
    "token_mean": {}, "seq_mean_token_mean": {}, "seq_mean_token_sum": {}, "seq_mean_token_sum_norm": {"horizon": 7},
    "token_sum": {},
}  # fmt: skip
LENGTHS = np.array([6, 3, 1, 5, 2, 6, 4, 0])
PACKED = [[0, 1], [2, 3, 4], [5], [6, 7]]  # row -> the sequences in it; 10 tokens wide, up to 3 segments


def batch(seed=0, rows=8, width=6):
    """Padded arrays, with rubbish (-inf, NaN) where a token is padding, holes in the mask, and an empty row."""
    rng = np.random.default_rng(seed)
    arrays = {"logprobs": rng.normal(-2, 0.7, (rows, width))}
    for name in ("old_logprobs", "proximal_logprobs", "behavior_logprobs", "ref_logprobs"):
        arrays[name] = arrays["logprobs"] + rng.normal(0, 0.4, (rows, width))
    arrays["advantages"] = np.repeat(rng.normal(size=(rows, 1)), width, axis=1)
    mask = (np.arange(width) < LENGTHS[:rows, None]) & (rng.random((rows, width)) < 0.85)
    mask[:, 0] = LENGTHS[:rows] > 0
    for name, array in arrays.items():
        arrays[name] = np.where(mask, array, np.nan if name == "advantages" else -np.inf).astype(np.float32)
    return arrays | {"mask": mask}


def call(name, arrays, **extra):
    arguments, keywords, _ = ALL[name]
    function = getattr(losses, name, None) or getattr(corrections, name)
    return function(*(arrays[argument] for argument in arguments), **keywords, **extra)


@functools.partial(tiny.jit, static_argnames=("name", "num_segments"))
def compiled(name, arrays, segment_ids, num_segments):
    packed = {} if segment_ids is None else {"segment_ids": segment_ids, "num_segments": num_segments}

    def total(logprobs):
        values = call(name, arrays | {"logprobs": logprobs}, **packed)
        return values.astype(jnp.float32).sum(), values

    return jax.grad(total, has_aux=True)(arrays["logprobs"])


def differentiate(name, arrays, segment_ids=None, num_segments=None):
    """Values, and the gradient of their sum with respect to the current log-probs."""
    used = {key: arrays[key] for key in ALL[name][0]}
    gradient, values = compiled(name, used, segment_ids, num_segments)
    return np.asarray(values), np.asarray(gradient)


def pack(arrays):
    """The same tokens in packed rows -> arrays, segment_ids, and where token (row, place) of the padded form went."""
    packed = {name: np.zeros((len(PACKED), 10), array.dtype) for name, array in arrays.items()}
    ids, where = np.zeros((len(PACKED), 10), np.int32), {}
    for name in ("logprobs", "behavior_logprobs"):
        packed[name][:] = -np.inf
    for row, members in enumerate(PACKED):
        start = 0
        for number, sequence in enumerate(members, 1):
            for t in range(LENGTHS[sequence]):
                for name, array in arrays.items():
                    packed[name][row, start] = array[sequence, t]
                ids[row, start] = number
                where[sequence, t] = (row, start)
                start += 1
    packed["mask"] |= ids == 0  # padding is left out by its id, whatever the mask says
    return packed, ids, where


@pytest.mark.parametrize("name", SEQUENCE)
def test_packed_rows_give_the_answer_of_padded_rows(name):
    arrays = batch()
    packed, ids, where = pack(arrays)
    values, gradient = differentiate(name, arrays)
    packed_values, packed_gradient = differentiate(name, packed, segment_ids=ids, num_segments=3)
    assert not packed_values[ids == 0].any() and not packed_gradient[ids == 0].any()
    for padded_place, packed_place in where.items():
        np.testing.assert_allclose(packed_values[packed_place], values[padded_place], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(packed_gradient[packed_place], gradient[padded_place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_packed_and_micro_batched_and_on_eight_devices(mode):
    arrays = batch()
    x, mask = arrays["logprobs"], arrays["mask"]
    keywords = {"mode": mode} | MODES[mode]
    whole = losses.aggregate(x, mask, **keywords)
    assert np.isfinite(whole.sum)

    packed, ids, _ = pack(arrays)
    same = losses.aggregate(packed["logprobs"], packed["mask"], segment_ids=ids, num_segments=3, **keywords)
    np.testing.assert_allclose(same, whole, rtol=1e-6)

    parts = [losses.aggregate(x[i : i + 2], mask[i : i + 2], **keywords) for i in (0, 2, 4, 6)]
    if mode == "token_sum":
        np.testing.assert_allclose(sum(part.sum for part in parts), whole.sum, rtol=1e-6)
    else:
        np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)  # pairs add up
    counts = {"num_tokens": mask.sum(), "num_sequences": mask.any(-1).sum()}  # or: global denominators
    quotients = [losses.aggregate(x[i : i + 2], mask[i : i + 2], **counts, **keywords).mean() for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(sum(quotients), whole.mean(), rtol=1e-6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for array in (x, mask)]
    np.testing.assert_allclose(tiny.jit(lambda x, m: losses.aggregate(x, m, **keywords))(*sharded), whole, rtol=1e-6)

    def local(x, mask):  # eight programs that see one row each
        pair = losses.aggregate(x, mask, **keywords)
        return jax.tree.map(lambda part: jax.lax.psum(part, "data"), pair)

    mapped = tiny.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec()))(*sharded)
    np.testing.assert_allclose(mapped.sum, whole.sum, rtol=1e-6)
    if mode != "token_sum":
        np.testing.assert_allclose(mapped.denominator, whole.denominator)


@pytest.mark.parametrize("name", [name for name in LOSSES if name.endswith("_loss")])
def test_gradients_do_not_depend_on_micro_batches_or_devices(name):
    arrays = batch(1)
    counts = {"num_tokens": arrays["mask"].sum(), "mode": "token_mean"}

    def objective(logprobs, arrays):
        values = call(name, arrays | {"logprobs": logprobs})
        return losses.aggregate(values, arrays["mask"], **counts).mean()

    gradient = tiny.jit(jax.grad(objective))
    whole = gradient(arrays["logprobs"], arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    eight = gradient(sharded["logprobs"], sharded)
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(eight, whole, rtol=1e-6, atol=1e-7)
    parts = [{k: v[i : i + 4] for k, v in arrays.items()} for i in (0, 4)]
    halves = [gradient(part["logprobs"], part) for part in parts]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_jit_vmap_grad_and_no_leak_from_masked_places(name):
    arrays = batch(2)
    values, gradient = differentiate(name, arrays)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    assert not values[~arrays["mask"]].any() and not gradient[~arrays["mask"]].any()
    np.testing.assert_allclose(values, call(name, arrays), rtol=1e-6, atol=1e-6)  # without jit
    assert values.dtype == (bool if name.endswith("_mask") else np.float32)
    if name in CORRECTIONS:
        assert not gradient.any()
    else:
        assert gradient.any()
    if not name.startswith("m2po"):  # those look at the whole batch
        keys = ALL[name][0]
        by_row = jax.vmap(lambda *row: call(name, dict(zip(keys, row))))(*(arrays[key] for key in keys))
        np.testing.assert_allclose(by_row, values, rtol=1e-6, atol=1e-6)


EXTREMES = np.array([0.0, -1e-8, -1e4, -3e38, -1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_extreme_log_probs_stay_finite(name, dtype):
    """Ratios that would overflow, in both directions and for both signs of the advantage; certain tokens; no tokens."""
    current, other, advantage = (x.reshape(-1) for x in np.meshgrid(EXTREMES, EXTREMES, [1.0, -1.0, 0.0]))
    arrays = {key: other[:, None] for key in ("old_logprobs", "proximal_logprobs", "behavior_logprobs", "ref_logprobs")}
    if name == "value_loss":  # values are no log-probs: the square of 3e38 is no float32
        current = np.clip(current, -1e4, None)
        arrays = {key: np.clip(array, -1e4, None) for key, array in arrays.items()}
    if name in ("asympo_loss", "reinforce_loss", "scaled_policy_loss", "cispo_loss", "aipo_loss", "topr_loss"):
        current = np.clip(current, -1e30, None)  # -A log pi is linear: it may not exceed float32 by itself
    arrays |= {"logprobs": current[:, None], "advantages": advantage[:, None]}
    arrays = {key: jnp.asarray(value).astype(dtype) for key, value in arrays.items()}
    for mask in (np.ones(current[:, None].shape), np.zeros(current[:, None].shape)):
        values, gradient = differentiate(name, arrays | {"mask": mask})
        assert np.isfinite(values).all()
        assert np.isfinite(gradient.astype(np.float32)).all()
    assert values.dtype in (np.float32, bool)
    assert gradient.dtype == dtype
    assert not values.any() and not gradient.any()


def test_bf16_inputs_are_computed_in_float32():
    arrays = batch(3)
    low = {key: jnp.asarray(value).astype(jnp.bfloat16) for key, value in arrays.items() if key != "mask"}
    up = {key: value.astype(jnp.float32) for key, value in low.items()}
    for name in ALL:
        mask = {"mask": arrays["mask"]}
        np.testing.assert_allclose(call(name, low | mask), call(name, up | mask), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", [name for name in LOSSES if name.endswith("_loss") and name != "value_loss"])
def test_only_the_current_log_probs_have_a_gradient(name):
    arrays = {key: value for key, value in batch(4).items()}
    arguments, _, _ = ALL[name]
    others = {key: jnp.where(arrays["mask"], arrays[key], 0) for key in arguments[1:-1]}
    gradients = tiny.jit(jax.grad(lambda others: call(name, arrays | others).sum()))(others)
    for key, gradient in gradients.items():
        assert not np.any(gradient), key


def test_without_a_mask_everything_is_trained():
    arrays = {key: np.nan_to_num(value, neginf=-1.0) for key, value in batch(5).items()}
    arrays["mask"] = np.ones_like(arrays["mask"])
    for name, (arguments, keywords, sequence) in ALL.items():
        if sequence or name.startswith("m2po"):
            continue
        function = getattr(losses, name, None) or getattr(corrections, name)
        bare = function(*(arrays[key] for key in arguments[:-1]), **keywords)
        np.testing.assert_array_equal(bare, call(name, arrays), name)


# What may be given by position, in order; everything else is keyword-only. People write these calls.
POSITIONAL = {
    "logprobs old_logprobs mask": "importance_log_ratio",
    "logprobs old_logprobs advantages mask": "ppo_clip_loss gspo_loss sapo_loss mirror_descent_loss",
    "logprobs proximal_logprobs behavior_logprobs advantages mask": "decoupled_ppo_loss",
    "logprobs behavior_logprobs advantages mask": (
        "cispo_loss aipo_loss topr_loss vespo_loss opsm_mask dppo_mask m2po_mask"
    ),
    "logprobs behavior_logprobs mask": "m2po_all_tokens_mask",
    "logprobs advantages mask": "reinforce_loss asympo_loss scaled_policy_loss nll_balance",
    "logprobs ref_logprobs mask": "kl_penalty",
    "logits": "entropy_from_logits",
    "values returns old_values mask": "value_loss",
    "per_token mask": "aggregate",
    "train_old sampler mask": "tis_weights icepop_weights sequence_is_mask",
    "behavior current behavior_version current_version": "interpolate_proximal_logprobs",
    "rewards group_ids": "group_relative leave_one_out asymre informative_group_mask",
    "rewards values mask": "gae",
}


@pytest.mark.parametrize("arguments", POSITIONAL)
def test_positional_arguments_and_their_order(arguments):
    for name in POSITIONAL[arguments].split():
        function = next(getattr(m, name) for m in (losses, corrections, advantages) if name in m.__all__)
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == arguments.split(), name


X, A = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
IDS = np.ones((2, 3), np.int32)
ERRORS = {
    r"old_logprobs has shape \(2, 4\), expected \(2, 3\), the shape of logprobs": lambda: losses.ppo_clip_loss(
        X, np.zeros((2, 4)), A
    ),
    r"advantages has shape \(2,\), expected \(2, 3\).*every token its sequence's advantage": lambda: (
        losses.reinforce_loss(X, np.ones(2))
    ),
    r"advantages has shape \(2, 1\), .*broadcast_to": lambda: losses.reinforce_loss(X, np.ones((2, 1))),
    "behavior_logprobs is None, expected an array": lambda: losses.cispo_loss(X, None, A),
    "logprobs is None, expected an array": lambda: losses.reinforce_loss(None, A),
    r"mask has shape \(3,\), expected \(2, 3\)": lambda: losses.sapo_loss(X, X, A, np.ones(3)),
    "logprobs is a scalar": lambda: losses.reinforce_loss(1.0, 1.0),
    "mask is None": lambda: losses.topr_loss(X, X, A, None),
    "segment_ids needs num_segments": lambda: losses.asympo_loss(X, A, A, segment_ids=IDS),
    "num_segments is given without segment_ids": lambda: losses.gspo_loss(X, X, A, A, num_segments=2),
    r"segment_ids has shape \(2,\), expected \(2, 3\)": lambda: losses.vespo_loss(
        X, X, A, A, segment_ids=IDS[:, 0], num_segments=2
    ),
    "segment_ids has dtype float32": lambda: losses.vespo_loss(X, X, A, A, segment_ids=A, num_segments=2),
    "num_segments=.* must be a Python int": lambda: jax.jit(
        lambda n: losses.aggregate(X, A, segment_ids=IDS, num_segments=n)
    )(2),
    "num_segments=0 must be at least 1": lambda: losses.aggregate(X, A, segment_ids=IDS, num_segments=0),
    "holds the id 7, but num_segments=2": lambda: losses.aggregate(X, A, segment_ids=7 * IDS, num_segments=2),
    "mode='mean' is not one of 'token_mean', 'seq_mean_token_mean'": lambda: losses.aggregate(X, A, mode="mean"),
    "seq_mean_token_sum_norm' needs horizon": lambda: losses.aggregate(X, A, mode="seq_mean_token_sum_norm"),
    "cap_mode='drop' is not one of 'mask', 'clamp'": lambda: losses.decoupled_ppo_loss(X, X, X, A, cap_mode="drop"),
    "kind='k4' is not one of 'k1', 'k2', 'k3'": lambda: losses.kl_penalty(X, X, kind="k4"),
    "dual_clip=0.5 must be above 1": lambda: losses.ppo_clip_loss(X, X, A, dual_clip=0.5),
    "clip is given without old_values": lambda: losses.value_loss(X, X, clip=0.2),
    "logits is a scalar": lambda: losses.entropy_from_logits(1.0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_at_trace_time(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])


def test_importing_the_objectives_imports_jax_numpy_and_chex_at_most():
    program = (
        "import sys, jax, jax.numpy, numpy, chex; before = set(sys.modules)\n"
        "import areal_jax.losses, areal_jax.advantages, areal_jax.corrections\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(n for n in new if n.split('.')[0] not in ('jax', 'jaxlib', 'numpy', 'chex')))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    own = ["_aggregate", "_arrays", "_diagnostics", "_penalties", "advantages", "corrections", "losses"]
    assert run.stdout.strip() == str(["areal_jax", *(f"areal_jax.{name}" for name in own)]), run.stderr
