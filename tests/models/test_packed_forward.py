"""Packed rows equal separate sequences, forward and gradient; nothing flows backwards or between segments."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models import attention_cudnn
from areal_jax.models.attention import attention, masked_attention
from tests.models import tiny

ROWS, LENGTH = 3, 64


def _loss(model, params, tokens, positions, segment_ids, weights):
    """Any function of every token's log-prob and entropy, each with a weight of its own."""
    logprobs, entropy = model.token_logprobs(params, tokens, positions, segment_ids, 0.8)
    return jnp.sum(weights * (logprobs + 0.3 * entropy**2))


def _separate(tokens, positions, segment_ids):
    """Each segment in a row of its own, and for every token of the packed rows its (row, column) there."""
    spans = []
    for row in range(tokens.shape[0]):
        for segment in range(1, segment_ids[row].max() + 1):
            spans.append((row, np.flatnonzero(segment_ids[row] == segment)))
    out = [np.zeros((len(spans), LENGTH), np.int32) for _ in range(3)]
    for i, (row, columns) in enumerate(spans):
        for target, source in zip(out, (tokens, positions, np.ones_like(tokens))):
            target[i, : len(columns)] = source[row, columns]
    return out, spans


@pytest.mark.parametrize(
    "name", ["qwen2-window", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2-tied", "qwen3", "qwen3-moe"))]
)
def test_packed_equals_separate_forward_and_gradient(name):
    model, params = tiny.model_and_params(name)
    batch = tiny.packed(ROWS, LENGTH)
    alone, spans = _separate(*batch)
    weights = np.random.default_rng(5).standard_normal((ROWS, LENGTH)).astype(np.float32)
    weights_alone = np.zeros(alone[0].shape, np.float32)
    for i, (row, columns) in enumerate(spans):
        weights_alone[i, : len(columns)] = weights[row, columns]
    run = tiny.jit(model.token_logprobs)
    packed, separate = run(params, *batch), run(params, *alone)
    for i, (row, columns) in enumerate(spans):
        for p, s in zip(packed, separate):
            np.testing.assert_allclose(p[row, columns], s[i, : len(columns)], atol=2e-5)
            assert p[row, columns[0]] == 0
    np.testing.assert_array_equal(np.asarray(packed)[:, batch[2] == 0], 0.0)
    grad = tiny.jit(jax.grad(functools.partial(_loss, model)))
    _assert_trees_close(grad(params, *batch, weights), grad(params, *alone, weights_alone))


def _assert_trees_close(got, want, tolerance=2e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["mistral", pytest.param("qwen2-tied", marks=pytest.mark.slow)])
def test_no_token_influences_an_earlier_one_or_another_segment(name):
    model, params = tiny.model_and_params(name)
    tokens, positions, segment_ids = tiny.packed(1, 40, segments=3)
    table = params["embedding"][tokens]

    def logits_of(embedded):  # the same network, with the embeddings of the row as its argument
        fed = dict(params, embedding=embedded[0], head=params.get("head", params["embedding"]))
        network = model if "head" in params else untied
        return network.logits(fed, np.arange(40, dtype=np.int32)[None], positions, segment_ids)

    untied = models.Model(models.ModelConfig.from_hf(tiny.CONFIGS[name] | {"tie_word_embeddings": False}))
    jacobian = tiny.jit(jax.jacrev(lambda x: jnp.sum(jnp.sin(logits_of(x)), axis=-1)))(table)  # [1, T, 1, T, D]
    influence = np.abs(np.asarray(jacobian)[0, :, 0]).max(-1)
    query, key = np.indices((40, 40))
    same = segment_ids[0][:, None] == segment_ids[0][None]
    allowed = (key <= query) & same
    assert (influence[~allowed] == 0).all()
    assert (influence[allowed & (segment_ids[0][:, None] != 0) & (query - key < 40)] > 0).all()


def test_blocks_of_queries_equal_the_full_square():
    rng = np.random.default_rng(0)
    length = 131
    q = rng.standard_normal((2, length, 6, 8), np.float32)
    k, v = (rng.standard_normal((2, length, 3, 8), np.float32) for _ in range(2))
    segment_ids = tiny.packed(2, length)[2]
    index = np.arange(length)
    for window in (None, 7, 60):
        distance = index[:, None] - index[None]
        mask = (distance >= 0) & (distance < (window or length)) & (segment_ids[:, :, None] == segment_ids[:, None])
        want = tiny.jit(masked_attention)(q, k, v, mask)
        run = tiny.jit(functools.partial(attention, window=window))
        np.testing.assert_allclose(run(q, k, v, segment_ids), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [name for name in models.REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(remat):
    model, params = tiny.model_and_params("qwen3")
    batch = tiny.packed(2, 48)
    weights = np.ones((2, 48), np.float32)
    plain = tiny.jit(jax.grad(functools.partial(_loss, model)))(params, *batch, weights)
    again = tiny.jit(jax.grad(functools.partial(_loss, model.with_(remat=remat))))(params, *batch, weights)
    _assert_trees_close(again, plain, 1e-6)


def _saved_bytes(model, params, batch):
    """Bytes of residuals of the backward pass, by abstract evaluation."""
    f = lambda p: jnp.sum(model.hidden(p, *batch))  # noqa: E731
    _, pullback = jax.eval_shape(lambda p: jax.vjp(f, p), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))


def test_remat_policies_keep_less_and_less():
    model, params = tiny.model_and_params("qwen3")
    batch = tiny.packed(8, 128)
    kept = [
        _saved_bytes(model.with_(remat=remat), params, batch)
        for remat in ("none", "attention_mlp", "attention_qkv", "attention", "full")
    ]
    assert all(more > less for more, less in itertools.pairwise(kept)), kept


def test_unknown_choices_are_refused():
    model, _ = tiny.model_and_params("qwen3")
    with pytest.raises(models.ModelError, match="remat policy 'most' is unknown; known: none, full"):
        model.with_(remat="most")
    with pytest.raises(models.ModelError, match="'flash' is unknown; known: auto, xla, cudnn"):
        model.with_(attention="flash")


# -- cuDNN, as far as a machine without a GPU can tell -----------------------------------------------------------------


def test_segment_table_lists_every_segment():
    segment_ids = np.array([[1, 1, 1, 5, 5, 2, 0, 0], [0, 3, 3, 0, 4, 4, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    lengths, starts, fits = attention_cudnn.segment_table(segment_ids, 4)
    np.testing.assert_array_equal(lengths, [[3, 2, 1, -1], [2, 4, -1, -1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(starts, [[0, 3, 5, -1, -1], [1, 4, -1, -1, -1], [0, 1, 2, 3, -1]])
    assert fits.tolist() == [True, True, False]


def test_grouped_queries_are_refused_where_jax_is_wrong():
    for version in ((0, 10, 2), (0, 11, 0)):
        with pytest.raises(models.ModelError, match=r"4 heads on 2.*wrong numbers in jax 0\.1.*>= 0\.11\.1"):
            attention_cudnn.require(jnp.bfloat16, heads=4, kv_heads=2, head_dim=64, jax_version=version)
    with pytest.raises(models.ModelError, match="needs bfloat16"):
        attention_cudnn.require(jnp.float32, heads=4, kv_heads=2, head_dim=64, jax_version=(0, 11, 1))
    with pytest.raises(models.ModelError, match="head_dim"):
        attention_cudnn.require(jnp.bfloat16, heads=4, kv_heads=2, head_dim=20, jax_version=(0, 12, 0, 1))


@pytest.fixture
def pretend_hopper(monkeypatch):
    """Lets the private call be traced, not run, on any machine."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(attention_cudnn, "require", lambda *args, **kwargs: None)
    return cudnn


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


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads, kv_heads, window", [(4, 4, None), (8, 2, None), (8, 2, 33)])
def test_cudnn_equals_xla_forward_and_gradient(heads, kv_heads, window):
    rng = np.random.default_rng(0)
    segment_ids = tiny.packed(3, 256, segments=5)[2]
    q, g = (jnp.asarray(rng.standard_normal((3, 256, heads, 64)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((3, 256, kv_heads, 64)), jnp.bfloat16) for _ in range(2))
    g = jnp.where((segment_ids != 0)[:, :, None, None], g, 0)

    def run(implementation):
        f = functools.partial(attention, segment_ids=segment_ids, window=window, implementation=implementation)
        out, pullback = jax.vjp(f, q, k, v)
        return [jnp.where((segment_ids != 0)[:, :, None, None], x, 0) for x in (out, *pullback(g))]

    for got, want in zip(run("cudnn"), run("xla")):
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=5e-2, rtol=5e-2)
