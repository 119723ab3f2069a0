"""The same numbers as `transformers`, and checkpoints that survive the way here and back byte for byte."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from areal_jax import models
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 520  # long enough that a wrong rotary frequency shows


# Where `tiny` has a family with one kind of head, the other: so that each is here tied and untied.
OTHER_HEADS = {
    f"{name}-other-head": tiny.CONFIGS[name] | {"tie_word_embeddings": not tiny.CONFIGS[name]["tie_word_embeddings"]}
    for name in ("qwen3", "mistral", "qwen3-moe")
}
CONFIGS = tiny.CONFIGS | OTHER_HEADS
# Of families that are there already, or whose parts others have: for the whole suite.
VARIANTS = ("qwen2-untied", "qwen2-window", "llama-linear", "mistral", "qwen3", *OTHER_HEADS)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in CONFIGS],
)
def checkpoint(request, tmp_path_factory):
    """(name, folder, the transformers model) of a random checkpoint, written by transformers itself."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = CONFIGS[request.param]
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
