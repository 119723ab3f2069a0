"""The same numbers as `transformers`, and checkpoints that survive the way here and back byte for byte."""

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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 520  # long enough that a wrong rotary frequency shows


VARIANTS = ("qwen2-untied", "qwen2-window", "llama-linear")  # of families that are there already


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in tiny.CONFIGS],
)
def checkpoint(request, tmp_path_factory):
    """(name, folder, the transformers model) of a random checkpoint, written by transformers itself."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = tiny.CONFIGS[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**hf)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in network.parameters():  # biases and norms are constants otherwise, and would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    # The hub's config files have the old keys; transformers writes the new ones. The loader must take both.
    if "rope_parameters" not in hf:
        (folder / "config.json").write_text(json.dumps(hf | {"dtype": "float32"}))
    return request.param, folder, network


def test_logits_and_logprobs_are_those_of_transformers(checkpoint):
    _, folder, network = checkpoint
    model, params = models.load_hf(folder)
    tokens, positions, segment_ids = tiny.one_sequence(2, LENGTH)
    with torch.no_grad():
        expected = network(torch.tensor(tokens).long()).logits
        chosen = torch.log_softmax(expected / 0.7, -1)[:, :-1].gather(-1, torch.tensor(tokens).long()[:, 1:, None])
        entropy = torch.distributions.Categorical(logits=expected[:, :-1] / 0.7).entropy()
    np.testing.assert_allclose(tiny.jit(model.logits)(params, tokens, positions, segment_ids), expected, atol=1e-4)
    got, got_entropy = tiny.jit(model.token_logprobs)(params, tokens, positions, segment_ids, 0.7)
    np.testing.assert_allclose(got[:, 1:], chosen[..., 0], atol=1e-4)
    np.testing.assert_allclose(got_entropy[:, 1:], entropy, atol=1e-4)
    np.testing.assert_array_equal(got[:, 0], 0.0)


def test_export_is_byte_equal_and_generates_the_same(checkpoint, tmp_path):
    _, folder, network = checkpoint
    model, params = models.load_hf(folder)
    out = tmp_path / "out"
    models.export_hf(model, params, out, source=folder, dtype=jnp.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompt = torch.tensor([[5, 17, 40, 3]])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(network.generate(prompt, **options), again.generate(prompt, **options))


def test_config_made_from_ours_says_the_same(checkpoint, tmp_path):
    _, folder, network = checkpoint
    model, params = models.load_hf(folder)
    models.export_hf(model, params, tmp_path / "out", dtype=jnp.float32)
    assert models.ModelConfig.from_hf(tmp_path / "out") == model.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits, network(tokens).logits, atol=1e-6)


def test_streamed_tensors_give_the_same_parameters(checkpoint):
    _, folder, _ = checkpoint
    model, params = models.load_hf(folder)
    tensors = list(models.to_hf(model, params, jnp.float32))
    specs = models.hf_tensor_specs(model, jnp.float32)
    assert [(n, t.shape, t.dtype) for n, t in tensors] == specs
    again = models.from_hf(model, reversed(tensors))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())


# -- one small checkpoint is enough for what follows -------------------------------------------------------------------


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
    params = model.init(jax.random.key(0))
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
