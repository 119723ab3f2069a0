"""Packed rows equal separate sequences, forward and gradient; nothing flows backwards or between segments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from areal_jax import models
from areal_jax.models import transformer
from areal_jax.models.attention import attention
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
    packed, separate = (np.asarray(run(params, *rows)) for rows in (batch, alone))
    for i, (row, columns) in enumerate(spans):
        for p, s in zip(packed, separate):
            np.testing.assert_allclose(p[row, columns], s[i, : len(columns)], atol=2e-5)
            assert p[row, columns[0]] == 0
    np.testing.assert_array_equal(packed[:, batch[2] == 0], 0.0)
    grad = tiny.jit(jax.grad(functools.partial(_loss, model)))
    _assert_trees_close(grad(params, *batch, weights), grad(params, *alone, weights_alone))


def _assert_trees_close(got, want, tolerance=2e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    got, want = jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(jax.device_get(want))
    for (path, a), b in zip(got, want, strict=True):
        scale = np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("lora", [None, pytest.param(models.Lora(3), marks=pytest.mark.slow)], ids=["plain", "lora"])
def test_gate_and_up_as_one_product_change_nothing(lora, monkeypatch):
    model, params = tiny.model_and_params("qwen2-tied")
    model = model.with_(lora=lora, remat="attention_mlp")
    params = jax.tree.map(lambda x: x + 0.01, models.add_lora(model, params))  # adapters that do something
    batch = (*tiny.packed(ROWS, LENGTH), np.ones((ROWS, LENGTH), np.float32))
    assert model.config.hidden_size < ROWS * LENGTH  # below that it is two products on a GPU as well
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(transformer, "on_gpu", lambda: on_gpu)  # noqa: B023
        run = tiny.jit(jax.value_and_grad(functools.partial(_loss, model)))
        found.append(run(params, *batch))
        shapes = str(jax.make_jaxpr(functools.partial(_loss, model))(params, *batch))
        assert (f"{model.config.mlp_size},2]" in shapes) == on_gpu
    (want, want_grad), (got, got_grad) = found
    np.testing.assert_allclose(got, want, rtol=1e-5)
    _assert_trees_close(got_grad, want_grad)


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


def _full_square(q, k, v, mask):
    """Attention as the formula has it: every query against every key, under a mask."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1), v)


@pytest.mark.parametrize("window", [None, 7, 60])
def test_blocks_of_queries_equal_the_full_square_forward_and_gradient(window):
    rng = np.random.default_rng(0)
    length = 260  # four blocks of uneven size
    q, weights = (rng.standard_normal((3, length, 6, 8), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((3, length, 3, 8), np.float32) for _ in range(2))
    segment_ids = np.array(tiny.packed(3, length)[2])
    segment_ids[2] = 0  # a row of nothing but padding
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    mask = (distance >= 0) & (distance < (window or length)) & (segment_ids[:, :, None] == segment_ids[:, None])

    def value_and_gradient(f):
        loss = lambda q, k, v: (jnp.sum(f(q, k, v) * weights), f(q, k, v))  # noqa: E731
        return tiny.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), gradients = value_and_gradient(lambda q, k, v: attention(q, k, v, segment_ids, window=window))
    (_, want), wanted = value_and_gradient(lambda q, k, v: _full_square(q, k, v, mask))
    np.testing.assert_allclose(out, want, atol=1e-6)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, segment_ids, window=window).astype(jnp.float32) * weights)  # noqa: E731
    for got, want in zip(tiny.jit(jax.grad(loss, (0, 1, 2)))(*low), wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 2e-2


def _products(jaxpr):
    """Every product in a jaxpr and all that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general"):
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _products(inner)


def test_what_attention_needs_is_kept_and_not_computed_again():
    model, params = tiny.model_and_params("qwen3")
    batch = tiny.packed(1, 128)

    def products(remat):
        gradient = jax.grad(lambda p: jnp.sum(model.with_(remat=remat).hidden(p, *batch)))
        return len(list(_products(jax.make_jaxpr(gradient)(params).jaxpr)))

    assert products("attention") < products("full")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["loop", "unrolled"])
@pytest.mark.parametrize("remat", [name for name in models.REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(remat, layers):
    model, params = tiny.model_and_params("qwen3")
    batch = tiny.packed(2, 48)
    weights = np.ones((2, 48), np.float32)
    plain = tiny.jit(jax.grad(functools.partial(_loss, model)))(params, *batch, weights)
    other = model.with_(remat=remat, layers=layers)
    again = tiny.jit(jax.grad(functools.partial(_loss, other)))(params, *batch, weights)
    _assert_trees_close(again, plain, 5e-6)  # the same numbers, rounded by other fusions


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
    with pytest.raises(models.ModelError, match="layers='some' is unknown; known: auto, loop, unrolled"):
        model.with_(layers="some")
    with pytest.raises(models.ModelError, match="'flash' is unknown; known: auto, xla, cudnn"):
        model.with_(attention="flash")


@pytest.mark.parametrize("name, experts", [("qwen3", "auto"), ("qwen3-moe", "dense"), ("qwen3-moe", "grouped")])
def test_every_float32_product_is_exact_on_a_gpu_too(name, experts):
    """Forward, backward, prefill and decode ask for full precision; a GPU's default would keep 10 bits."""
    model, params = tiny.model_and_params(name)
    model, batch = model.with_(experts=experts), tiny.packed(ROWS, LENGTH)
    slots, cache = np.arange(ROWS, dtype=np.int32), model.init_cache(ROWS, LENGTH)
    grad = jax.make_jaxpr(jax.grad(functools.partial(_loss, model)))(params, *batch, np.ones((ROWS, LENGTH)))
    prefill = jax.make_jaxpr(model.prefill)(params, cache, batch[0], slots + 3, slots)
    decode = jax.make_jaxpr(model.decode)(params, cache, slots, slots)
    for program, fewest in ((grad, 30), (prefill, 9), (decode, 9)):
        found = [eqn for eqn in _products(program.jaxpr) if eqn.invars[0].aval.dtype == jnp.float32]
        assert len(found) >= fewest
        assert not [str(eqn) for eqn in found if eqn.params["precision"] != (jax.lax.Precision.HIGHEST,) * 2]
