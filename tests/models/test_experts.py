"""The grouped products of a mixture of experts equal those of all experts on all tokens, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models import moe
from areal_jax.models.sharding import Place
from tests.models import tiny

MESHES = [None, dict(data=4, expert=2), dict(fsdp=2, tensor=2, expert=2)]


def _inputs(rng, experts=6, width=12, hidden=8):
    x = rng.standard_normal((40, width), np.float32)
    router = rng.standard_normal((experts, width), np.float32)
    gate, up = rng.standard_normal((2, experts, hidden, width), np.float32)
    down = rng.standard_normal((experts, width, hidden), np.float32)
    return x, router, gate, up, down


def blocks_of(rows):
    """`moe.block_shape` with so many rows in a block."""
    return lambda pairs, experts, shards: (-(-(pairs // rows + experts // shards) // shards) * shards, rows)


def test_router_keeps_the_best_and_renormalises():
    x, router = np.eye(1, 2, dtype=np.float32), np.log(np.array([[1, 0.5], [2, 0.5], [5, 0.5]], np.float32))
    for renormalize, want in ((True, [5 / 7, 2 / 7]), (False, [5 / 8, 2 / 8])):
        indices, weights = moe.route(x, router, top_k=2, renormalize=renormalize)
        assert indices.tolist() == [[2, 1]]
        np.testing.assert_allclose(weights[0], want, rtol=1e-6)


@pytest.mark.parametrize("block", [4, pytest.param(64, marks=pytest.mark.slow)])  # several of an expert, and one
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_grouped_equals_dense_forward_and_gradient(sizes, block, monkeypatch):
    monkeypatch.setattr(moe, "block_shape", blocks_of(block))
    args = _inputs(np.random.default_rng(0))
    direction = np.random.default_rng(1).standard_normal((40, 12)).astype(np.float32)

    def loss(mix, x, router, *weights):
        return jnp.sum(direction * mix(x, *moe.route(x, router, top_k=2, renormalize=True), *weights))

    place = Place(models.make_mesh(**sizes) if sizes else None)
    want = tiny.jit(jax.value_and_grad(lambda *a: loss(moe.dense, *a), (0, 1, 2, 3, 4)))(*args)
    got = tiny.jit(jax.value_and_grad(lambda *a: loss(moe.grouped(place), *a), (0, 1, 2, 3, 4)))(*args)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("block", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_an_expert_that_nobody_chose_and_one_that_all_chose(block, monkeypatch):
    monkeypatch.setattr(moe, "block_shape", blocks_of(block))
    x, _, *weights = _inputs(np.random.default_rng(2))
    indices = np.zeros((40, 2), np.int32)
    indices[..., 1] = 3  # experts 0 and 3 take everything
    share = np.full((40, 2), 0.5, np.float32)
    want = moe.dense(x, indices, share, *weights)
    np.testing.assert_allclose(moe.grouped(Place(None))(x, indices, share, *weights), want, atol=1e-4)


def test_grouped_does_the_arithmetic_of_the_chosen_experts():
    """Of 32 experts two are chosen; the rest is padding. (`ragged_dot` would do twice what `dense` does.)"""
    tokens, experts, width, top_k = 4096, 32, 64, 2
    weights = [jax.ShapeDtypeStruct((experts, width, width), jnp.float32)] * 3
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    chosen = [jax.ShapeDtypeStruct((tokens, top_k), dtype) for dtype in (jnp.int32, jnp.float32)]

    def operations(mix):
        gradient = jax.grad(lambda x, i, w, *m: jnp.sum(mix(x, i, w, *m) ** 2), (0, 3, 4, 5))
        return tiny.jit(gradient).lower(x, *chosen, *weights).compile().cost_analysis()["flops"]

    least = 9 * 2 * tokens * top_k * width**2
    assert least < operations(moe.grouped(Place(None))) < 2.5 * least < 16 * least < operations(moe.dense)


def test_the_network_takes_either():
    model, params = tiny.model_and_params("qwen3-moe")
    batch = tiny.packed(2, 32)
    want = tiny.jit(model.with_(experts="dense").logits)(params, *batch)
    got = tiny.jit(model.with_(experts="grouped").logits)(params, *batch)
    np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(models.ModelError, match="'sparse' is unknown; known: auto, dense, grouped"):
        model.with_(experts="sparse")
