"""The memory estimate against what XLA says of the compiled training step, and against the models' own shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax.models import Lora, Model, ModelConfig, logprobs, moe, transformer
from areal_jax.models.sharding import make_mesh
from areal_jax.trainer import learner, memory, state, steps
from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.packing import max_segments

SMALL = ModelConfig(
    family="qwen2", vocab_size=4096, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
    mlp_size=384, qkv_bias=True,
)  # fmt: skip
MIXTURE = {"family": "qwen3_moe", "num_experts": 8, "experts_per_token": 2, "expert_mlp_size": 64, "qk_norm": True}


def planned(config: ModelConfig, trainer: TrainerConfig, devices: int):
    """XLA's memory plan of `accumulate` for one of so many devices; nothing is run."""
    mesh = learner.mesh_of(trainer, jax.devices()[:devices])
    # With a loop: XLA's CPU compiler does not order written-out layers by memory, as its GPU compiler does.
    model = Model(config, mesh=mesh, remat=trainer.remat, attention=trainer.attention, layers="loop")
    optimizer = state.make_optimizer(trainer)
    params = model.abstract_params()
    objective = learner.make_objective(trainer, horizon=10.0)
    run = steps.Steps(model, objective, optimizer, mesh, state.abstract(params, optimizer, mesh))
    kinds = {"mask": jnp.bool_, "behavior_logprobs": jnp.float32, "advantages": jnp.float32}
    shape = (trainer.rows, trainer.row_length)
    micro = {name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32)) for name in steps.ON_DEVICE}
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
    proximal = jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = run.accumulate.lower(
        params, gradients, jax.eval_shape(objective.zero_sums), micro, steps.scalars(1, 1, 0), proximal, None, None
    )
    # Of the code's quality, which takes most of the time, the plan is independent.
    return lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "full", "attention_qkv", "attention_mlp", "none"])
def test_the_estimate_is_what_xla_plans(remat):
    trainer = TrainerConfig(row_length=512, rows=4, remat=remat, attention="xla", fsdp=1)
    estimate = memory.trainer(SMALL, trainer, 1)
    plan = planned(SMALL, trainer, 1)
    used = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    expected = estimate.total - estimate.parts["runtime"] - estimate.parts["moments"]  # not in this function
    assert used <= expected <= 1.45 * used


@pytest.mark.slow
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_the_whole_gradient_is_never_on_one_device(as_on_gpu, monkeypatch):
    """Each layer's gradient is reduced to the parameter's own shard as it is made, not after all of them are there."""
    for part in (logprobs, transformer):
        monkeypatch.setattr(part, "on_gpu", lambda: as_on_gpu)
    config = dataclasses.replace(SMALL, num_layers=24, vocab_size=128)
    whole = 4 * Model(config).num_params()
    plans = {}
    for fsdp in (1, 8):
        sizes = {"data_parallel": 8 // fsdp, "fsdp": fsdp}
        trainer = TrainerConfig(row_length=32, rows=8, remat="full", attention="xla", **sizes)
        plans[fsdp] = planned(config, trainer, 8)
    assert plans[1].output_size_in_bytes > whole
    assert plans[8].output_size_in_bytes < 1.1 * whole / 8
    assert plans[8].temp_size_in_bytes < whole / 4


def test_flash_attention_keeps_a_number_for_every_segment_that_a_row_may_hold():
    """Float32 [rows x segments, heads, row length] per layer: the shape that tests/models/test_cudnn.py finds."""
    trainer = TrainerConfig(row_length=512, rows=4, remat="attention", attention="cudnn", fsdp=1)

    def estimated(**changes):
        return memory.trainer(SMALL, dataclasses.replace(trainer, **changes), 1).parts["flash statistics"]

    one_layer = 4 * (4 * max_segments(trainer)) * SMALL.num_heads * 512
    assert estimated() == SMALL.num_layers * one_layer
    assert estimated(remat="full") == one_layer
    assert estimated(attention="xla") == 0


def test_constants_are_the_codes_own():
    assert memory.LOGITS_PER_CHUNK == logprobs.LOGITS_PER_CHUNK_GPU
    mixture = dataclasses.replace(SMALL, **MIXTURE)
    for tokens, expert in ((100, 1), (3_000, 2), (100_000, 4)):
        assert memory._blocks(mixture, tokens, expert) == moe.block_shape(tokens * 2, 8, expert)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"family": "qwen3", "qkv_bias": False, "qk_norm": True},
        {"family": "llama", "qkv_bias": True, "output_bias": True},
        MIXTURE,
    ],
)
def test_parameters_are_counted_as_the_network_has_them(changes):
    config = dataclasses.replace(SMALL, **changes)
    assert memory.num_params(config) == Model(config).num_params()


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({}, {"fsdp": 4, "tensor": 2}), ({}, {"fsdp": 4, "expert": 2}), (MIXTURE, {"fsdp": 2, "expert": 4})],
    ids=str,
)
def test_what_is_sharded_is_what_the_mesh_shards(changes, sizes):
    config = dataclasses.replace(SMALL, **changes)
    abstract = Model(config, mesh=make_mesh(jax.devices(), **sizes)).abstract_params()
    mine = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract)) * 4
    estimate = memory.trainer(config, TrainerConfig(**sizes), 8)
    assert estimate.parts["parameters"] == pytest.approx(mine, rel=0.02)
    assert estimate.parts["moments"] == pytest.approx(2 * mine, rel=0.02)


def test_a_layer_is_as_large_whether_the_head_is_tied_or_not():
    tied, untied = (
        memory.trainer(dataclasses.replace(SMALL, vocab_size=152_064, tie_embeddings=tie), TrainerConfig(), 1).parts
        for tie in (True, False)
    )
    assert tied["one layer"] == pytest.approx(untied["one layer"])


def test_heads_that_the_mesh_does_not_divide_are_counted_whole():
    trainer = TrainerConfig(tensor=4, attention="xla", remat="attention")
    two, four = (memory.trainer(dataclasses.replace(SMALL, num_kv_heads=n), trainer, 4).parts for n in (2, 4))
    assert two["scores"] == 4 * four["scores"]
    tokens, queries = trainer.rows * trainer.row_length, SMALL.num_heads * SMALL.head_dim
    more = SMALL.num_layers * tokens * 4 * queries * (1 - 1 / 4)
    assert two["kept activations"] - four["kept activations"] == pytest.approx(more)


def test_adapters_shrink_what_is_trained():
    full, lora = (memory.trainer(SMALL, TrainerConfig(lora_rank=rank), 1).parts for rank in (0, 4))
    adapted = Model(SMALL, lora=Lora(4))
    assert lora["moments"] >= (adapted.num_params() - Model(SMALL).num_params()) * 8
    assert lora["moments"] < 0.2 * full["moments"] and lora["parameters"] == full["parameters"]


def test_a_mesh_that_does_not_fit_is_said():
    with pytest.raises(ValueError, match="does not fit 6 devices"):
        memory.trainer(SMALL, TrainerConfig(tensor=4), 6)
    assert memory.mesh_sizes(TrainerConfig(tensor=2), 8) == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1}
