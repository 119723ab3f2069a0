"""What published config.json files say: read as `transformers` reads them, or refused with a sentence."""

import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models
from areal_jax.models.transformer import rope_angles
from tests.models import published, tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}


@pytest.mark.parametrize("name", published.CONFIGS)
def test_published_configs_mean_what_they_mean_to_transformers(name):
    """At their true sizes, without arrays: names and shapes of all tensors, rotary frequencies, window, tie."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf = published.CONFIGS[name]
    ours, theirs = models.ModelConfig.from_hf(hf), transformers.AutoConfig.for_model(**hf)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {n: tuple(tensor.shape) for n, tensor in network.state_dict().items()}
    if theirs.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {n: shape for n, shape, _ in models.hf_tensor_specs(models.Model(ours))}
    if ours.num_experts:  # transformers holds them in another form than the files
        found, expected = ({n: s for n, s in x.items() if "experts" not in n} for x in (found, expected))
    assert found == expected
    frequencies = type(network.model.rotary_emb)(theirs).inv_freq.numpy()
    cos, sin = rope_angles(jnp.arange(3), ours.head_dim, ours.rope)
    np.testing.assert_allclose(cos, np.cos(np.arange(3)[:, None] * frequencies), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(np.arange(3)[:, None] * frequencies), atol=1e-6)
    assert (ours.sliding_window, ours.norm_eps) == (getattr(theirs, "sliding_window", None), theirs.rms_norm_eps)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen3-8B", {"rope_scaling": YARN}, "rope type 'yarn' is not implemented"),
        ("Llama-2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "lacks 'low_freq_factor'"),
        ("Llama-2-7b", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ("Llama-2-7b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            "Qwen3-8B",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"some layers \(full_attention, sliding_attention\)",
        ),
        ("Qwen2.5-7B-Instruct", {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized \(awq\)"),
        ("Qwen2.5-7B-Instruct", {"use_sliding_window": True, "max_window_layers": 14}, "layer_types"),
        ("Mistral-7B-v0.1", {"layer_types": ["sliding_attention", "full_attention"] * 16}, "layer_types"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("Llama-3.2-1B", {"mlp_bias": True}, "mlp_bias=True"),
        ("Qwen2.5-0.5B", {"architectures": ["Qwen2ForSequenceClassification"]}, "implemented: Qwen2ForCausalLM"),
    ],
)
def test_what_is_not_implemented_is_said(name, changes, message):
    with pytest.raises(models.ModelError, match=message):
        models.ModelConfig.from_hf(published.CONFIGS[name] | changes)


def test_defaults_are_those_of_transformers():
    def read(name, *missing, **changes):
        return models.ModelConfig.from_hf({k: v for k, v in (tiny.CONFIGS[name] | changes).items() if k not in missing})

    window = {"use_sliding_window": True, "max_window_layers": 0}
    assert read("qwen2-tied", "sliding_window", **window).sliding_window == 4096
    assert read("mistral", "sliding_window").sliding_window == 4096
    assert read("mistral", sliding_window=0).sliding_window is None  # which some checkpoints say, and vLLM takes so
    assert read("qwen2-tied", sliding_window=0, **window).sliding_window is None
    # In every layer of a mixture, whatever max_window_layers says.
    assert read("qwen3-moe", use_sliding_window=True, sliding_window=50, max_window_layers=2).sliding_window == 50
    assert read("qwen3-moe", head_dim=None).head_dim == read("qwen3-moe", "head_dim").head_dim == 12
    assert read("qwen3", "head_dim").head_dim == 128
    for name in tiny.CONFIGS:
        assert not read(name, "tie_word_embeddings").tie_embeddings
    scaling = {k: v for k, v in tiny.LLAMA3.items() if not k.startswith("original")}
    assert read("llama3", rope_scaling=scaling).rope.original_max_position == 1024
