"""A toy model and batches for the trainer's tests; not a test itself."""

import dataclasses

import jax
import numpy as np

from areal_jax import models
from areal_jax.models import Model, ModelConfig
from areal_jax.trainer import learner, packing, state
from areal_jax.trainer.advantages import AdvantageEstimator
from areal_jax.trainer.batch import TrainBatch, make_batch
from areal_jax.trainer.config import TrainerConfig
from areal_jax.transport.messages import GroupResult, Trajectory
from tests.models import tiny

VOCAB = 40


def settings(**changes) -> TrainerConfig:
    defaults = {"rows": 8, "row_length": 64, "learning_rate": 1e-3, "proximal": "fused", "steps": 20, "epsilon": 1e-4}
    return TrainerConfig(**(defaults | changes))


def make_model(*, width=32, layers=2, heads=4, vocab=VOCAB, mesh=None, **options) -> Model:
    config = ModelConfig(
        family="qwen2", vocab_size=vocab, hidden_size=width, num_layers=layers, num_heads=heads, num_kv_heads=2,
        head_dim=width // heads, mlp_size=3 * width, tie_embeddings=True, qkv_bias=True, init_std=0.2,
    )  # fmt: skip
    return Model(config, attention="xla", mesh=mesh, **options)


def make_learner(config: TrainerConfig, *, mesh=None, params=None, train_state=None, objective=None, **options):
    mesh = mesh or models.make_mesh(jax.devices()[:1])
    model = make_model(mesh=mesh, **options)
    if params is None and train_state is None:
        params = tiny.random_params(model)
    reference = jax.tree.map(jax.numpy.copy, params) if config.kl_coef else None  # which no step overwrites
    objective = objective or learner.make_objective(config, horizon=48.0)
    return learner.Learner(
        model, params, config, mesh=mesh, objective=objective, reference=reference, train_state=train_state
    )


def make_groups(
    rng, *, groups=4, samples=4, version=0, lags=(0,), lengths=(8, 40), ragged=False, prompt=4, vocab=VOCAB
):
    """Random trajectories with plausible log-probs; a trajectory's versions are non-decreasing over its answer."""
    made = []
    for g in range(groups):
        count = samples - (rng.integers(0, samples - 1) if ragged else 0)
        trajectories = []
        for _ in range(count):
            n = int(rng.integers(*lengths))
            mask = np.arange(n) >= prompt
            lag = np.sort(rng.choice(lags, n))[::-1]
            trajectories.append(
                Trajectory(
                    tokens=rng.integers(0, vocab, n).astype(np.int32),
                    loss_mask=mask,
                    logprobs=np.where(mask, -rng.uniform(1, 5, n), 0).astype(np.float32),
                    versions=np.where(mask, version - lag, -1).astype(np.int32),
                    reward=float(rng.integers(0, 2)),
                    finish_reason="stop",
                    metrics={"accuracy": float(rng.integers(0, 2))},
                )
            )
        made.append(GroupResult(group=g, record_index=g, epoch=0, samples=[[t] for t in trajectories]))
    return made


def random_batch(seed=0, *, version=0, estimator=None, **kwargs) -> TrainBatch:
    groups = make_groups(np.random.default_rng(seed), version=version, **kwargs)
    samples = sum(len(g.samples) for g in groups)
    estimator = estimator or AdvantageEstimator("group_relative", {}, len(groups), samples, 64)
    return make_batch(groups, version, estimator)


def on_policy(batch: TrainBatch, the_learner, noise=0.0) -> TrainBatch:
    """The batch with behaviour log-probs that the learner's own parameters give (plus noise)."""
    c = the_learner.config
    packed = packing.pack(batch.samples, rows=c.rows, row_length=c.row_length, max_segments=8)
    run = the_learner.steps
    logprobs = np.stack([np.asarray(run.logprobs(the_learner.state.params, run.put(m))) for m in packed])
    rng = np.random.default_rng(7)
    samples = [
        dataclasses.replace(s, behavior_logprobs=lp + noise * rng.normal(size=len(lp)).astype(np.float32))
        for s, lp in zip(batch.samples, packed.unpack(logprobs), strict=True)
    ]
    return dataclasses.replace(batch, samples=samples)


def renew(the_learner):
    """Puts a learner back to the state it began with, without compiling anything again."""
    mesh, params = the_learner.mesh, tiny.random_params(the_learner.model)
    the_learner.state = state.create(params, the_learner.optimizer, mesh)
    the_learner.version = 0
    return the_learner
