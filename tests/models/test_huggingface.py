"""Checkpoint folders: what is wrong with one is named, what is written is whole, and loading is frugal."""

import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from areal_jax import models
from areal_jax.models import huggingface
from tests.models import tiny


@pytest.fixture
def folder(tmp_path):
    model, params = tiny.model_and_params("qwen2-untied")
    models.export_hf(model, params, tmp_path / "original", dtype=jnp.float32)
    return tmp_path / "original"


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(NAME), f"missing.*{NAME}"),
        (lambda t: t.update({"model.extra": t[NAME]}), "no place.*model.extra"),
        (lambda t: t.update({NAME: t[NAME][1:].copy()}), f"{NAME}.*shape"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    _edit(folder, change)
    with pytest.raises(models.ModelError, match=words):
        models.load_hf(folder)


def test_a_wrong_tensor_of_a_stream_is_named():
    model, params = tiny.model_and_params("qwen2-untied")
    tensors = list(models.to_hf(model, params, jnp.float32))
    with pytest.raises(models.ModelError, match=r"missing.*lm_head\.weight"):
        models.from_hf(model, tensors[:-1])
    with pytest.raises(models.ModelError, match=r"model\.norm\.weight.*twice"):
        models.from_hf(model, [*tensors, tensors[-2]])
    with pytest.raises(models.ModelError, match=r"'bogus'.*no parameter"):
        models.from_hf(model, [*tensors, ("bogus", tensors[0][1])])
    with pytest.raises(models.ModelError, match=r"embed_tokens.*shape"):
        models.from_hf(model, [(tensors[0][0], tensors[0][1][1:]), *tensors[1:]])


def test_unknown_architectures_and_options_are_refused():
    with pytest.raises(models.ModelError, match=r"GPT2LMHeadModel.*implemented: Qwen2ForCausalLM"):
        models.ModelConfig.from_hf({"architectures": ["GPT2LMHeadModel"]})
    llama = tiny.CONFIGS["llama3"]
    with pytest.raises(models.ModelError, match="hidden_act='gelu'"):
        models.ModelConfig.from_hf(llama | {"hidden_act": "gelu"})
    with pytest.raises(models.ModelError, match="rope type 'longrope'"):
        models.ModelConfig.from_hf(llama | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}})
    with pytest.raises(models.ModelError, match="lacks 'vocab_size'"):
        models.ModelConfig.from_hf({k: v for k, v in llama.items() if k != "vocab_size"})
    with pytest.raises(models.ModelError, match="layer_types"):
        models.ModelConfig.from_hf(tiny.CONFIGS["qwen2-window"] | {"max_window_layers": 1})


@pytest.mark.parametrize("limit", [10**9, 40_000], ids=["one file", "index"])
def test_weights_are_those_that_transformers_takes_whatever_lies_beside_them(folder, tmp_path, limit):
    model, params = models.load_hf(folder)
    out = tmp_path / "out"
    models.export_hf(model, params, out, dtype=jnp.float32, max_shard_bytes=limit)
    save_file({"layers.0.attention.wq.weight": np.zeros((2, 2), np.float32)}, out / "consolidated.safetensors")
    save_file({NAME: np.zeros((2, 2), np.float32)}, out / "model.fp16.safetensors")
    _, again = models.load_hf(out)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_checkpoint_that_is_not_whole_names_the_file(folder, tmp_path):
    models.export_hf(*models.load_hf(folder), tmp_path / "out", max_shard_bytes=40_000)
    lost = sorted((tmp_path / "out").glob("model-00002-*"))[0]
    lost.unlink()
    with pytest.raises(models.ModelError, match=f"not whole: {lost.name}"):
        models.load_hf(tmp_path / "out")
    (tmp_path / "out/model.safetensors.index.json").write_text("{}")
    with pytest.raises(models.ModelError, match="not the index of a checkpoint"):
        models.load_hf(tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(models.ModelError, match=r"config\.json' is not JSON"):
        models.load_hf(folder)


def test_a_head_that_is_tied_in_name_only_is_refused(tmp_path):
    model, params = tiny.model_and_params("qwen2-tied")
    models.export_hf(model, params, tmp_path / "tied", dtype=jnp.bfloat16)
    embedding = np.asarray(params["embedding"])
    _edit(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": embedding}))
    models.load_hf(tmp_path / "tied")
    _edit(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(models.ModelError, match="not the embedding, which tie_word_embeddings says"):
        models.load_hf(tmp_path / "tied")


def test_rotary_frequencies_of_old_checkpoints_are_not_needed(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _, params = models.load_hf(folder)
    _edit(folder, lambda tensors: tensors.update({name: np.ones(6, np.float32)}))
    model, again = models.load_hf(folder)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    models.from_hf(model, load_file(folder / "model.safetensors").items())


def test_size_limited_shards_have_an_index_and_load(folder, tmp_path):
    model, params = models.load_hf(folder)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f"contents of {name}")
    models.export_hf(model, params, tmp_path / "out", source=folder, dtype=jnp.bfloat16, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _, _ in models.hf_tensor_specs(model)}
    assert index["metadata"]["total_size"] == 2 * model.num_params()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000 and all(
            index["weight_map"][n] == file for n in tensors
        )
    assert (tmp_path / "out/chat_template.jinja").read_text() == "contents of chat_template.jinja"
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    _, again = models.load_hf(tmp_path / "out")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16).astype(jnp.float32), b), params, again
    )


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_exported_weights_may_be_read_by_whom_the_user_lets(folder, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        models.export_hf(*models.load_hf(folder), tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {
        "config.json": mode, "model.safetensors": mode,
    }  # fmt: skip


def test_a_failed_export_leaves_nothing(folder, tmp_path):
    model, params = models.load_hf(folder)
    with pytest.raises(models.ModelError, match="another model"):
        models.export_hf(tiny.model_and_params("qwen2-tied")[0], params, tmp_path / "out", source=folder)
    broken = dict(params, final_norm=None)
    with pytest.raises(AttributeError):
        models.export_hf(model, broken, tmp_path / "out", source=folder, max_shard_bytes=40_000)
    assert sorted(os.listdir(tmp_path)) == ["original"]
    models.export_hf(model, params, tmp_path / "out", source=folder)
    with pytest.raises(models.ModelError, match="exists"):
        models.export_hf(model, params, tmp_path / "out", source=folder)
    models.export_hf(model, params, tmp_path / "out", source=folder, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["original", "out"]


@pytest.mark.parametrize("sizes", [None, dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_loading_holds_a_layer_of_a_large_parameter_in_host_memory_not_all_of_it(tmp_path, monkeypatch, sizes):
    hf = tiny.CONFIGS["qwen2-untied"] | {"num_hidden_layers": 12, "intermediate_size": 2048}
    model = models.Model(models.ModelConfig.from_hf(hf), mesh=models.make_mesh(**sizes) if sizes else None)
    params = tiny.random_params(model)
    models.export_hf(model, params, tmp_path / "out", dtype=jnp.float32, max_shard_bytes=1_000_000)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    layer = kernel.nbytes // 12
    monkeypatch.setattr(huggingface, "STAGED_BYTES", layer)
    models.load_hf(tmp_path / "out", mesh=model.mesh)  # so that what jax keeps of compiling is there before
    tracemalloc.start()  # counts numpy's arrays and what safetensors reads, not jax's arrays
    try:
        _, again = models.load_hf(tmp_path / "out", mesh=model.mesh)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert jax.tree.map(lambda p: p.sharding, again) == jax.tree.map(lambda p: p.sharding, params)
    assert peak < 4 * layer < kernel.nbytes / 2, peak


@pytest.mark.parametrize("sizes", [dict(data=8), dict(fsdp=4, data=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_loading_onto_a_mesh_gives_the_same_values_on_their_shards(folder, sizes):
    _, expected = models.load_hf(folder)
    model, params = models.load_hf(folder, mesh=models.make_mesh(**sizes))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jax.tree.map(lambda p: p.sharding, params) == model.param_shardings()
    assert len(params["layers"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
