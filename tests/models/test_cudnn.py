"""The packed cuDNN path, as far as a machine without a GPU can tell, and against XLA's where there is one.

What cannot be run here is the kernel. So it is played by a few lines of jax that read the segment lengths and offsets
the way cuDNN does, and leave NaN wherever cuDNN writes nothing. All that surrounds the kernel is the real thing: our
table of segments, jax's rearrangement of it, the partitioning over a mesh, the custom gradient.
"""

import functools
import inspect
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

from areal_jax import models
from areal_jax.models import attention as attention_lib
from areal_jax.models import attention_cudnn, sharding
from areal_jax.models.attention import attention
from tests.models import tiny

RIGHT = jax.__version_info__[:3] >= attention_cudnn.FIRST_RIGHT_JAX  # with grouped queries


def test_segment_table_lists_every_segment():
    segment_ids = np.array([[1, 1, 1, 5, 5, 2, 0, 0], [0, 3, 3, 0, 4, 4, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    lengths, starts, fits = attention_cudnn.segment_table(segment_ids, 4)
    np.testing.assert_array_equal(lengths, [[3, 2, 1, -1], [2, 4, -1, -1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(starts, [[0, 3, 5, -1, -1], [1, 4, -1, -1, -1], [0, 1, 2, 3, -1]])
    assert fits.tolist() == [True, True, False]


# -- when it may be used -----------------------------------------------------------------------------------------------


def test_grouped_queries_are_refused_where_jax_is_wrong():
    for version in ((0, 10, 2), (0, 11, 0)):
        with pytest.raises(models.ModelError, match=r"4 heads on 2.*wrong numbers in jax 0\.1.*>= 0\.11\.1"):
            attention_cudnn.require(jnp.bfloat16, heads=4, kv_heads=2, head_dim=64, jax_version=version)
    with pytest.raises(models.ModelError, match="needs bfloat16"):
        attention_cudnn.require(jnp.float32, heads=4, kv_heads=2, head_dim=64, jax_version=(0, 11, 1))
    with pytest.raises(models.ModelError, match="head_dim"):
        attention_cudnn.require(jnp.bfloat16, heads=4, kv_heads=2, head_dim=20, jax_version=(0, 12, 0, 1))


@pytest.fixture
def pretend_gpu(monkeypatch):
    """`pretend_gpu(jax_version, compute_capability)` makes this process look like a machine with such a GPU."""

    def pretend(version, capability):
        monkeypatch.setattr(jax, "__version_info__", version)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])

    return pretend


@pytest.mark.parametrize(
    "version, capability, kv_heads, chosen",
    [
        ((0, 10, 2), "9.0", 2, "xla"),
        ((0, 11, 0), "9.0", 2, "xla"),
        ((0, 11, 1), "9.0", 2, "cudnn"),
        ((0, 12, 0, 1), "10.0", 2, "cudnn"),
        ((0, 10, 2), "9.0", 4, "cudnn"),  # without grouped queries it was always right
        ((0, 12, 0, 1), "8.0", 4, "xla"),
        ((0, 12, 0, 1), "gfx942", 4, "xla"),
    ],
)
def test_auto_takes_cudnn_only_where_it_is_right(pretend_gpu, caplog, version, capability, kv_heads, chosen):
    sizes = dict(heads=4, kv_heads=kv_heads, head_dim=64)
    assert attention_lib.resolve("auto", "bfloat16", **sizes) == "xla"  # no GPU yet, and no warning
    assert not caplog.records
    pretend_gpu(version, capability)
    with caplog.at_level(logging.WARNING):
        assert attention_lib.resolve("auto", "bfloat16", **sizes) == chosen
    assert bool(caplog.records) == (chosen == "xla")  # a slow path on a GPU is said aloud


def test_a_network_that_asks_for_cudnn_is_refused_where_it_is_wrong(pretend_gpu):
    model, _ = tiny.model_and_params("mistral")
    model = model.with_(attention="cudnn", compute_dtype="bfloat16")
    pretend_gpu((0, 11, 0), "9.0")
    with pytest.raises(models.ModelError, match=r"wrong numbers in jax 0\.11\.0"):
        jax.eval_shape(model.logits, model.abstract_params(), *tiny.packed(2, 32))


# -- what is asked of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def pretend_hopper(monkeypatch):
    """Lets the private call be traced, not run, on any machine."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(attention_cudnn, "require", lambda *args, **kwargs: None)
    return cudnn


# Four key/value heads are not split over eight devices, and neither are the queries that look at them.
@pytest.mark.parametrize(
    ("sizes", "kv_heads", "refused"), [({}, 16, True), ({"data": 8}, 16, False), ({"tensor": 8}, 4, True)]
)
def test_more_queries_than_jax_can_address_are_refused(pretend_hopper, sizes, kv_heads, refused):
    devices = jax.devices()[: max(sizes.values(), default=1)]
    place = sharding.Place(sharding.make_mesh(devices, **sizes))
    q = jax.ShapeDtypeStruct((64, 32_768, 16, 128), jnp.bfloat16)  # 2^32 numbers
    k = jax.ShapeDtypeStruct((*q.shape[:2], kv_heads, 128), q.dtype)
    ids = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
    call = functools.partial(attention_cudnn.attention, window=None, max_segments=4, place=place)
    if refused:
        with pytest.raises(models.ModelError, match=r"use fewer trainer\.rows"):
            jax.eval_shape(call, q, k, k, ids)
    else:
        assert jax.eval_shape(call, q, k, k, ids).shape == q.shape


def test_the_private_call_has_the_arguments_we_name(pretend_hopper):
    known = inspect.signature(pretend_hopper.dot_product_attention).parameters
    named = "query key value q_seqlen kv_seqlen q_offsets kv_offsets scale mask_type qkv_layout sliding_window_length"
    assert set(named.split()) <= set(known)
    assert pretend_hopper.has_padding(pretend_hopper.MaskType.PADDING_CAUSAL)
    assert pretend_hopper.get_max_seg_per_batch(jnp.zeros((2, 5))) == 4  # [B, M + 1] offsets mean M segments


@pytest.mark.parametrize("remat, runs", [("none", 1), ("full", 2), ("attention", 1)])
def test_with_its_outputs_kept_the_flash_kernel_runs_once(pretend_hopper, remat, runs):
    model, params = tiny.model_and_params("mistral")
    model = model.with_(compute_dtype="bfloat16", attention="cudnn", remat=remat)
    batch = tiny.packed(2, 64)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, *batch).astype(jnp.float32).sum()))(params)
    assert str(jaxpr).count("dot_product_attention_fwd") == runs


def test_a_cuda_program_calls_the_kernel_forward_and_backward(pretend_hopper):
    """The network's gradient, lowered for CUDA: the kernels' names, shapes and settings stand in the program."""
    model, params = tiny.model_and_params("mistral")
    model = model.with_(compute_dtype="bfloat16", attention="cudnn", max_segments=7, layers="loop")
    batch = tiny.packed(2, 64)
    gradient = tiny.jit(jax.grad(lambda p: model.hidden(p, *batch).astype(jnp.float32).sum()))
    program = gradient.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(.*?\) \{.*backend_config = (\".*?\"),.* : (\(.*\)) -> ", program)
    # What the backward pass needs beside the output: for each row and segment, one number per head and token.
    assert "(tensor<2x4x64x16xbf16>, tensor<14x4x64xf32>, " in program
    assert [name for name, _, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, config, operands in calls:
        for key, value in (
            ("mask_type", r"\\22PADDING_CAUSAL"),
            ("fmha_scale", "0.25,"),  # 1 / sqrt(16)
            ("sliding_window_length", "40,"),
            ("max_seg_per_batch", "7,"),
            ("dropout_rate", "0.0,"),
        ):
            assert re.search(rf"{key}\\22: {value}", config), (key, config)
        # queries, keys, values, and at the end the lengths and offsets of 7 segments in each of 2 rows
        assert operands.startswith("(tensor<2x64x4x16xbf16>, tensor<2x64x2x16xbf16>, tensor<2x64x2x16xbf16>, ")
        assert operands.endswith("tensor<2x7xi32>, tensor<2x7xi32>, tensor<2x8xi32>, tensor<2x8xi32>)")


# -- the kernel, played ------------------------------------------------------------------------------------------------


def _segments(x, lengths, offsets):
    """What cuDNN makes of the tables: the segment of each token of all rows in one line, and its place there.

    Entry i of `offsets` is where segment i begins, counted in elements of x; `lengths` counts tokens. -1 is no segment.
    """
    rows, width, heads, size = x.shape
    token = jnp.arange(rows * width)[:, None]
    first = offsets.reshape(-1)[: lengths.size] // (heads * size)
    inside = (token >= first) & (token < first + lengths.reshape(-1))
    segment = jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), -1)
    return segment, token[:, 0] - first[segment]


def _play(q, k, v, q_lengths, k_lengths, q_offsets, k_offsets, scale, window):
    """Attention of all rows' tokens, in one line; `(out, which queries are written, which keys are)`."""
    (q_segment, q_place), (k_segment, k_place) = _segments(q, q_lengths, q_offsets), _segments(k, k_lengths, k_offsets)
    mask = (q_segment[:, None] == k_segment) & (q_segment[:, None] >= 0) & (k_place <= q_place[:, None])
    if window:
        mask &= q_place[:, None] - k_place < window
    queries, keys, values = (x.astype(jnp.float32).reshape(-1, *x.shape[2:]) for x in (q, k, v))
    keys, values = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=1) for x in (keys, values))
    scores = jnp.where(mask, jnp.einsum("qnh,knh->nqk", queries, keys) * scale, -1e30)
    out = jnp.einsum("nqk,knh->qnh", jax.nn.softmax(scores), values).reshape(q.shape).astype(q.dtype)
    return out, (q_segment >= 0).reshape(*q.shape[:2], 1, 1), (k_segment >= 0).reshape(*k.shape[:2], 1, 1)


def _unwritten(written, x):
    return jnp.where(written, x, jnp.full((), jnp.nan, x.dtype))


def _forward(q, k, v, bias, *tables, scale, sliding_window_length, is_training, **_):
    out, written, _ = _play(q, k, v, *tables[:4], scale, sliding_window_length)
    statistics = jnp.zeros((tables[0].size, q.shape[2], q.shape[1]), jnp.float32)
    return (_unwritten(written, out), statistics) if is_training else (_unwritten(written, out),)


def _backward(q, k, v, bias, *rest, scale, sliding_window_length, **_):
    def run(q, k, v):
        out, *written = _play(q, k, v, *rest[:4], scale, sliding_window_length)
        return out, written

    _, pullback, (q_written, k_written) = jax.vjp(run, q, k, v, has_aux=True)
    d_q, d_k, d_v = pullback(rest[8])  # after lengths, offsets, two page tables, statistics and the output
    return _unwritten(q_written, d_q), _unwritten(k_written, d_k), _unwritten(k_written, d_v)


def _briefly(rule):
    """The strict rules of the tests are for our code; a part that is played may be written briefly."""

    def run(*args, **params):
        with jax.numpy_rank_promotion("allow"):
            return rule(*args, **params)

    return run


@pytest.fixture
def played_kernel(pretend_hopper):
    """The private call runs on this machine, with the kernel played; on a GPU this is not needed."""
    for primitive, rule in (
        (pretend_hopper._dot_product_attention_fwd_p, _forward),
        (pretend_hopper._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(_briefly(rule), multiple_results=True), platform="cpu")


def _inputs(heads, kv_heads, size=8, rows=4, length=40):
    """q, k, v and a cotangent that is 0 at padding, bf16; rows of several segments, one of padding alone."""
    rng = np.random.default_rng(0)
    segment_ids = tiny.packed(rows, length, segments=5)[2]
    segment_ids[3] = 0
    q, g = (jnp.asarray(rng.standard_normal((rows, length, heads, size)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((rows, length, kv_heads, size)), jnp.bfloat16) for _ in range(2))
    return q, k, v, jnp.where((segment_ids != 0)[:, :, None, None], g, 0), segment_ids


@functools.partial(tiny.jit, static_argnames=("implementation", "window"))
def _both_passes(q, k, v, g, segment_ids, implementation, window):
    """Output and the three gradients, float32; the oracle's are set to 0 at padding, where the others must be 0."""
    run = functools.partial(
        attention, segment_ids=segment_ids, window=window, implementation=implementation, max_segments=6
    )
    out, pullback = jax.vjp(run, q, k, v)
    found = [x.astype(jnp.float32) for x in (out, *pullback(g))]
    return [jnp.where((segment_ids != 0)[:, :, None, None], x, 0) for x in found] if implementation == "xla" else found


def _difference(got, want):
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "heads, kv_heads, window",
    [(4, 4, 9), (4, 2, 9), *(pytest.param(4, n, None, marks=pytest.mark.slow) for n in (4, 2))],
)
def test_the_tables_say_what_xla_computes_forward_and_gradient(played_kernel, heads, kv_heads, window):
    inputs = _inputs(heads, kv_heads)
    want = _both_passes(*inputs, "xla", window)
    got = _both_passes(*inputs, "cudnn", window)
    if heads == kv_heads or RIGHT:
        assert _difference(got, want) < 0.05
    else:  # the reason for the refusal: with this jax the keys are looked for in the wrong place
        assert not _difference(got, want) < 1


def test_a_row_with_too_many_segments_gives_nan_and_the_others_do_not(played_kernel):
    q, k, v, _, segment_ids = _inputs(4, 4)
    segment_ids[1, :16] = np.repeat(np.arange(1, 9), 2)
    out = jax.jit(functools.partial(attention, implementation="cudnn", max_segments=6))(q, k, v, segment_ids)
    assert np.isnan(out[1]).all() and not np.isnan(out[0]).any()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (fake) devices")
@pytest.mark.slow
def test_a_network_on_a_mesh_gives_each_device_the_tables_of_its_own_rows(played_kernel):
    hf = tiny.CONFIGS["mistral"] | {"num_hidden_layers": 2} | ({} if RIGHT else {"num_key_value_heads": 4})
    model = models.Model(models.ModelConfig.from_hf(hf), compute_dtype="bfloat16", max_segments=5)
    params = tiny.random_params(model)
    batch = tiny.packed(8, 32)
    weights = np.random.default_rng(3).standard_normal((8, 32)).astype(np.float32)

    def loss(model, params, batch, weights):
        logprobs, entropy = model.token_logprobs(params, *batch)
        return jnp.sum(weights * (logprobs + 0.2 * entropy))

    run = tiny.jit(jax.value_and_grad(functools.partial(loss, model.with_(attention="xla"))))
    want, want_grad = run(params, batch, weights)
    sharded = model.with_(attention="cudnn", remat="attention", mesh=models.make_mesh(data=2, fsdp=2, tensor=2))
    rows = sharding.named_sharding(sharded.mesh, ("batch", None), weights.shape)
    placed = jax.device_put(params, sharded.param_shardings()), jax.device_put((batch, weights), rows)
    got, got_grad = tiny.jit(jax.value_and_grad(functools.partial(loss, sharded)))(placed[0], *placed[1])
    np.testing.assert_allclose(got, want, rtol=1e-2)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want_grad))
    for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
        np.testing.assert_allclose(a / scale, b / scale, atol=0.05)


# -- the kernel itself -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads, kv_heads, window", [(4, 4, None), (8, 2, None), (8, 2, 33)])
def test_cudnn_equals_xla_forward_and_gradient(heads, kv_heads, window):
    inputs = _inputs(heads, kv_heads, size=64, rows=4, length=256)
    want, got = (_both_passes(*inputs, which, window) for which in ("xla", "cudnn"))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=5e-2, rtol=5e-2)
