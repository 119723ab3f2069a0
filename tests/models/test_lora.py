"""Adapters: nothing changes at first, they alone are trained, and export merges them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models.tables import flatten, unflatten
from tests.models import tiny


@functools.cache
def _with_adapters(rank=3):
    model, params = tiny.model_and_params("qwen2-untied")
    model = model.with_(lora=models.Lora(rank, alpha=6.0))
    return model, models.add_lora(model, params, jax.random.key(1))


def _random_b(params):
    rng = np.random.default_rng(2)
    flat = flatten(params)
    noise = {p: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)) for p, x in flat.items() if "lora_b" in p}
    return unflatten(flat | noise)


@pytest.mark.slow
def test_fresh_adapters_change_nothing_and_trained_ones_merge_exactly():
    base, base_params = tiny.model_and_params("qwen2-untied")
    model, params = _with_adapters()
    batch = tiny.packed(2, 40)
    want = tiny.jit(base.logits)(base_params, *batch)
    run = tiny.jit(model.logits)
    np.testing.assert_array_equal(run(params, *batch), want)
    params = _random_b(params)
    got = run(params, *batch)
    assert np.abs(got - want).max() > 0.1
    merged = models.merge_lora(model, params)
    assert jax.tree.structure(merged) == jax.tree.structure(base_params)
    np.testing.assert_allclose(tiny.jit(base.logits)(merged, *batch), got, atol=1e-4)


def test_adapters_alone_are_trainable():
    model, params = _with_adapters()
    mask = flatten(models.trainable(model, params))
    assert {path for path, train in mask.items() if train} == {p for p in mask if p.endswith(("lora_a", "lora_b"))}
    assert sum(mask.values()) == 2 * 7
    base, base_params = tiny.model_and_params("qwen2-untied")
    assert all(flatten(models.trainable(base, base_params)).values())


def test_export_has_the_tensors_of_the_merged_network(tmp_path):
    model, params = _with_adapters()
    params = _random_b(params)
    models.export_hf(model, params, tmp_path / "out", dtype=jnp.float32)
    _, again = models.load_hf(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, models.merge_lora(model, params))
    loaded, with_adapters = models.load_hf(tmp_path / "out", lora=models.Lora(2, targets=("q", "v")))
    fresh = {p for p in flatten(with_adapters) if "lora" in p}
    assert fresh == {f"layers/attention/{x}/lora_{y}" for x in "qv" for y in "ab"}
    assert jax.tree.structure(with_adapters) == jax.tree.structure(loaded.abstract_params())


def test_adapters_on_nothing_are_refused():
    for wrong in (("q_proj", "v_proj"), ()):
        with pytest.raises(models.ModelError, match="the projections are called q, k, v, o, gate, up, down"):
            models.Lora(8, targets=wrong)
    with pytest.raises(models.ModelError, match="rank 0"):
        models.Lora(0)
    assert models.Lora(8, targets=["q", "v"]) == models.Lora(8, targets=("q", "v"))
    mixture = tiny.model_and_params("qwen3-moe")[0]
    with pytest.raises(models.ModelError, match="experts have none; name some of q, k, v, o"):
        mixture.with_(lora=models.Lora(8, targets=("gate", "up", "down")))
