"""One device and eight give the same numbers; parameters, gradients and activations live where the rules say."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from areal_jax import models
from areal_jax.models import gather, logprobs, sharding, transformer
from tests.models import tiny

MESHES = [dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)]
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (fake) devices")


def _weighted(logprob, entropy, arrays):
    (weights,), entropy_weight = arrays
    return jnp.sum(weights * (logprob + entropy_weight * entropy)), ()


def _step(model, params, batch, by_chunks=False):
    """Loss, log-probs, and gradients constrained to the parameters' own shards."""
    *rows, weights = batch
    arrays = ((weights,), jnp.float32(0.2))

    def loss(p):
        logprob, entropy = model.token_logprobs(p, *rows, 0.9)
        if by_chunks:
            return model.token_loss(p, *rows, _weighted, arrays, 0.9)[0], logprob
        return _weighted(logprob, entropy, arrays)[0], logprob

    (value, logprob), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if model.mesh is not None:
        grads = jax.lax.with_sharding_constraint(grads, model.param_shardings())
    return value, logprob, grads


@pytest.mark.parametrize(
    "name, sizes, by_chunks",
    [
        *(pytest.param("qwen2-tied", sizes, True, marks=pytest.mark.slow) for sizes in MESHES[:2]),
        ("qwen2-untied", MESHES[2], True),
        pytest.param("qwen2-tied", MESHES[2], False, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", dict(data=2, fsdp=2, expert=2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_give_the_numbers_of_one(name, sizes, by_chunks, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 1)  # chunks of the smallest size: several, whatever the mesh
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK_GPU", 1)
    model, params = tiny.model_and_params(name)
    weights = np.random.default_rng(3).standard_normal((8, 160)).astype(np.float32)
    batch = (*tiny.packed(8, 160), weights)
    want = tiny.jit(lambda p, b: _step(model, p, b))(params, batch)
    sharded = model.with_(mesh=models.make_mesh(**sizes))
    placed = jax.device_put(params, sharded.param_shardings())
    rows = sharding.named_sharding(sharded.mesh, ("batch", None), (8, 160))
    for part in (logprobs, transformer):  # what only GPUs do is right on any mesh, too
        monkeypatch.setattr(part, "on_gpu", lambda: by_chunks)
    got = tiny.jit(lambda p, b: _step(sharded, p, b, by_chunks))(placed, jax.device_put(batch, rows))
    same_place = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, g.ndim), got[2], placed)
    assert all(jax.tree.leaves(same_place))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=2e-5)
    for a, b in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_parameters_are_born_on_their_shards_with_the_same_values():
    model, _ = tiny.model_and_params("qwen3")
    sharded = model.with_(mesh=models.make_mesh(data=2, fsdp=2, tensor=2))
    params = sharded.init(jax.random.key(3))
    assert jax.tree.map(lambda p: p.sharding, params) == sharded.param_shardings()
    jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(3)))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "tensor", "fsdp")
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    abstract = sharded.abstract_params()
    assert jax.tree.map(lambda a: a.sharding, abstract) == sharded.param_shardings()


def test_what_several_processes_gather_for_the_host_is_never_more_than_some_layers(monkeypatch):
    model, params = tiny.model_and_params("qwen3-moe")
    sharded = model.with_(mesh=models.make_mesh(fsdp=4, tensor=2))
    placed = jax.device_put(params, sharded.param_shardings())
    whole = list(models.to_hf(sharded, placed, jnp.float32))
    sizes, rows = [], gather._rows
    monkeypatch.setattr(gather, "GATHERED_BYTES", 1)
    monkeypatch.setattr(gather, "_is_here", lambda x: False)
    monkeypatch.setattr(gather, "_rows", lambda x, first, size: sizes.append((x.ndim, size)) or rows(x, first, size))
    for (a, tensor), (b, expected) in zip(models.to_hf(sharded, placed, jnp.float32), whole, strict=True):
        assert a == b
        np.testing.assert_array_equal(tensor, expected, err_msg=a)
    layers = model.config.num_layers
    assert layers > 1 and sum(size == 1 for _, size in sizes) == len(sizes) - sum(size > layers for _, size in sizes)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    others = list(models.to_hf(sharded, placed, jnp.float32))
    assert [(n, x.shape, x.any()) for n, x in others] == [(n, x.shape, False) for n, x in whole], (
        "only the first has them"
    )


def test_what_does_not_divide_stays_whole():
    mesh = models.make_mesh(fsdp=2, tensor=4)
    assert sharding.partition_spec(mesh, ("layers", "kv_heads", "head_dim", "embed"), (3, 2, 16, 48)) == P(
        None, None, None, "fsdp"
    )
    assert sharding.partition_spec(mesh, ("batch", None), (6, 10)) == P("fsdp", None)
    mesh = models.make_mesh(data=2, fsdp=4)
    assert sharding.partition_spec(mesh, ("batch",), (8,)) == P(("data", "fsdp"))
    assert sharding.partition_spec(mesh, ("batch",), (2,)) == P("data")


def test_no_device_gathers_the_embeddings_of_all_tokens():
    """A table split over words and columns, tokens over data and fsdp: columns are traded, forward and backward."""
    mesh, tokens, table = models.make_mesh(data=2, fsdp=2, tensor=2), 1024, (96, 64)
    place, rng = sharding.Place(mesh), np.random.default_rng(0)

    def gradient(place, table, ids, weights):
        return jax.grad(lambda t: jnp.sum(weights * place(place.rows(t, ids), "batch", None) ** 2))(table)

    given = rng.standard_normal(table, np.float32), rng.integers(0, 96, tokens), rng.standard_normal((tokens, 64))
    axes = ("vocab", "embed"), ("batch",), ("batch", None)
    where = [sharding.named_sharding(mesh, a, x.shape) for a, x in zip(axes, given)]
    run = jax.jit(functools.partial(gradient, place), in_shardings=where, out_shardings=where[0])
    np.testing.assert_allclose(run(*given), gradient(sharding.ANYWHERE, *map(jnp.asarray, given)), rtol=1e-5, atol=1e-5)
    program = run.lower(*given).compile().as_text()
    assert "all-to-all" in program
    assert not [size for size in re.findall(r"f32\[(\d+),\d+\]\S* all-gather", program) if int(size) >= tokens]


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(models.ModelError, match="needs 4 devices, there are 8"):
        models.make_mesh(data=4)
    with pytest.raises(models.ModelError, match=r"unknown mesh axes.*sequence"):
        models.make_mesh(sequence=8)


def test_every_parameter_has_axes_of_its_rank():
    for hf in tiny.CONFIGS.values():
        model = models.Model(models.ModelConfig.from_hf(hf), lora=models.Lora(2))
        ranks = jax.tree.map(lambda a: len(a.shape), model.abstract_params())
        assert jax.tree.map(len, model.logical_axes(), is_leaf=sharding.is_axes) == ranks
