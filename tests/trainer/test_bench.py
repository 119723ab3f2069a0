"""The measuring tool measures what it says: FLOPs by hand, the mix of lengths, and a whole tiny measurement."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from areal_jax.models import Lora, Model, ModelConfig
from areal_jax.trainer import flops, packing

PATH = Path(__file__).parents[2] / "tools" / "bench_trainer.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_trainer", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flops_are_those_of_the_formula(bench):
    """Qwen2.5-0.5B, one sequence of 1000 tokens: 494 M parameters with the tied head, and half of the square."""
    half = ModelConfig(**bench.SIZES["0.5B"])
    attention = 24 * 14 * 64 * 1000**2
    assert flops.model_flops(half, [1000]) == pytest.approx(6 * 494.03e6 * 1000 + 6 * attention, rel=1e-4)
    whole_square = flops.model_flops(half, [1000], causal=False)
    assert whole_square - flops.model_flops(half, [1000]) == pytest.approx(6 * attention)
    adapted = Model(half, lora=Lora(4)).num_params() - Model(half).num_params()
    with_adapters = flops.model_flops(half, [1000], lora_rank=4)
    assert with_adapters == pytest.approx(1000 * (4 * 494.03e6 + 6 * adapted) + 6 * attention, rel=1e-4)
    untied = ModelConfig(**bench.SIZES["7B"])
    parameters = 7.6156e9 - 152064 * 3584  # the embedding table multiplies nothing
    assert flops.model_flops(untied, [1]) == pytest.approx(6 * parameters + 6 * 28 * 28 * 128, rel=1e-3)
    experts = {"family": "qwen3_moe", "num_experts": 8, "experts_per_token": 2, "expert_mlp_size": 64}
    mixture = dataclasses.replace(half, tie_embeddings=False, **experts)
    idle = 24 * 6 * 3 * 896 * 64 + 151936 * 896  # the experts that a token does not pass, and the table
    assert flops.model_flops(mixture, [0, 1]) == 6 * (Model(mixture).num_params() - idle + 24 * 14 * 64)


def test_a_step_reports_its_share_of_the_peak_where_that_is_known(bench, monkeypatch):
    """The names are NVIDIA's; no figure is made up for a device that is not in the table."""
    assert [flops.peak_of(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H100 PCIe", "GB200", "T4")] == [
        ("H100", 989e12), ("H100 PCIe", 756e12), ("GB200", 2500e12), None,
    ]  # fmt: skip
    tiny = ModelConfig(**bench.SIZES["tiny"])
    assert flops.speed(tiny, [30, 50], 0.5) == {"perf/train_tokens_per_s": 160}
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 1e9)
    share = flops.model_flops(tiny, [30, 50]) / 0.5 / (1e9 * jax.device_count())
    assert flops.speed(tiny, [30, 50], 0.5)["perf/mfu"] == pytest.approx(share)


# Parameters in millions, from the checkpoints' own cards (Qwen2.5 and Qwen3).
PUBLISHED = {"0.5B": 494, "0.6B": 596, "1.5B": 1544, "7B": 7616}


@pytest.mark.parametrize("size", ["tiny", "small", *PUBLISHED])
def test_every_size_has_a_training_step(bench, size):
    """Forward and gradient of the network, by shapes alone: nothing is allocated, also for 7B."""
    model = Model(ModelConfig(**bench.SIZES[size]), compute_dtype="bfloat16", remat="attention")
    if size in PUBLISHED:
        assert model.num_params() / 1e6 == pytest.approx(PUBLISHED[size], rel=2e-3)
    rows = [jax.ShapeDtypeStruct((8, 2048), np.int32)] * 3
    params = model.abstract_params()
    gradients = jax.eval_shape(jax.grad(lambda p, *rows: model.token_logprobs(p, *rows)[0].sum()), params, *rows)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), gradients) == jax.tree.map(lambda p: (p.shape, p.dtype), params)


def test_lengths_follow_the_mix(bench):
    lengths = bench.lengths_of("uniform:10:30", 1000, 64)
    assert 950 <= lengths.sum() <= 1030 and lengths.min() >= 10 and lengths.max() <= 30
    assert bench.lengths_of("full", 256, 64).tolist() == [64] * 4
    with pytest.raises(SystemExit, match="must lie between 2 and --row-length 64"):
        bench.lengths_of("fixed:65", 256, 64)


def test_a_steps_micro_batches_are_full_and_no_more(bench):
    args = argparse.Namespace(
        rows=4, row_length=512, micro_batches=8, lengths="uniform:32:256", packing="dynamic", dtype="float32",
        remat="none", attention="auto", layers="auto", max_segments=16, data=1, fsdp=1, tensor=1,
    )  # fmt: skip
    lengths = bench.lengths_that_fit(args)
    assert 0.97 < lengths.sum() / (8 * 4 * 512) <= 1
    assert len(packing.allocate(lengths, 512, max_items=16)) <= 32
    more = bench.lengths_of(args.lengths, 8 * 4 * 512, 512)[: len(lengths) + 1]
    assert len(more) == len(lengths) or len(packing.allocate(more, 512, max_items=16)) > 32


@pytest.mark.slow
def test_a_measurement_of_both_sides(bench, tmp_path, capsys):
    pytest.importorskip("torch")
    path = tmp_path / "found.json"
    arguments = ["--size", "tiny", "--rows", "2", "--row-length", "64", "--lengths", "uniform:8:40", "--repeats", "1"]
    arguments += ["--warm-up", "0", "--fsdp", "1", "--baseline", "torch", "--json", str(path), "--peak-tflops", "0.1"]
    bench.main(arguments)
    ours, theirs = json.loads(path.read_text())
    assert (ours["mode"], theirs["mode"]) == ("areal_jax", "torch")
    for found in (ours, theirs):
        assert found["tokens_per_second"] > 0 and 0 < found["mfu"] < 1 and found["peak_memory_bytes"] > 0
    assert ours["tokens"] == theirs["tokens"] and ours["recompiles"] == 0
    assert "tokens/s" in capsys.readouterr().out
