"""From the controller's groups to samples with advantages, and their split into minibatches. No model in here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from areal_jax.trainer.advantages import AdvantageEstimator
from areal_jax.trainer.packing import Sample
from areal_jax.transport.messages import GroupResult, Trajectory


class StalenessError(RuntimeError):
    """A batch holds a token that is older than the bound allows: the gate is broken, and training must not go on."""


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One global batch, ready to be packed: samples of all groups in the order the controller gave them."""

    version: int  # of the parameters before this step
    samples: list[Sample]
    group_ids: np.ndarray  # int32 [N], 0 .. groups - 1
    report: dict[str, Any]  # what the data itself says: rewards, lengths, staleness


def make_batch(
    groups: Sequence[GroupResult], version: int, estimator: AdvantageEstimator, *, max_staleness: int | None = None
) -> TrainBatch:
    """Flattens groups into samples with advantages, and asserts the staleness bound.

    Every trajectory is a member of its group with its own reward, also where one episode made several.

    Raises:
      StalenessError: a trained token's version is more than `max_staleness` behind `version`, or ahead of it.
    """
    pairs = [(g, t) for g, group in enumerate(groups) for sample in group.samples for t in sample if t.loss_mask.any()]
    trajectories = [t for _, t in pairs]
    ids = np.array([g for g, _ in pairs], np.int32)
    oldest = np.array([t.oldest_version for t in trajectories], np.int64)
    for group in groups:
        check_staleness(group, version, max_staleness)
    values = estimator(trajectories, ids) if trajectories else []
    samples = [
        Sample(tokens=t.tokens, mask=t.loss_mask, behavior_logprobs=t.logprobs, versions=t.versions, advantages=a)
        for t, a in zip(trajectories, values, strict=True)
    ]
    return TrainBatch(version, samples, ids, describe(trajectories, ids, version - oldest, values))


def check_staleness(group: GroupResult, version: int, max_staleness: int | None) -> None:
    """Raises `StalenessError` unless 0 <= version − v <= max_staleness for every trained token's v."""
    trained = [t.versions[t.loss_mask] for sample in group.samples for t in sample if t.loss_mask.any()]
    if not trained:
        return
    oldest, newest = min(int(v.min()) for v in trained), max(int(v.max()) for v in trained)
    if newest > version or oldest < 0:
        raise StalenessError(
            f"group {group.group} holds tokens of versions {oldest} to {newest}, but the trainer is at {version}: "
            "the engine stamps tokens wrongly, or the run's folder belongs to another run"
        )
    if max_staleness is not None and version - oldest > max_staleness:
        raise StalenessError(
            f"group {group.group} holds tokens of version {oldest}: {version - oldest} behind version {version}, "
            f"and controller.max_staleness is {max_staleness}"
        )


def describe(trajectories: Sequence[Trajectory], group_ids: np.ndarray, lag: np.ndarray, values) -> dict[str, Any]:
    """The report of a batch's data: reward, lengths, staleness, and how much its groups can teach."""
    if not trajectories:
        return {"batch/samples": 0}
    rewards = np.array([t.reward for t in trajectories], np.float64)
    lengths = np.array([int(t.loss_mask.sum()) for t in trajectories])
    spans = np.array([len(np.unique(t.versions[t.loss_mask])) for t in trajectories])
    groups = np.unique(group_ids)
    equal = np.mean([np.ptp(rewards[group_ids == g]) == 0 for g in groups])
    report: dict[str, Any] = {
        "batch/samples": len(trajectories),
        "batch/groups": len(groups),
        "batch/tokens": int(sum(len(t.tokens) for t in trajectories)),
        "batch/trained_tokens": int(lengths.sum()),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/equal_groups": float(equal),
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
        "length/truncated": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "advantage/abs_mean": float(np.mean([_trained(np.abs(a), t).mean() for a, t in zip(values, trajectories)])),
        "staleness/mean": float(lag.mean()),
        "staleness/max": int(lag.max()),
        "staleness/min": int(lag.min()),
        "staleness/hist": np.bincount(lag).tolist(),
        "staleness/spans": float(spans.mean()),
    }
    for name in sorted({name for t in trajectories for name in t.metrics}):
        report[f"reward/{name}"] = float(np.mean([t.metrics[name] for t in trajectories if name in t.metrics]))
    return report


def _trained(values: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """The values of the trained tokens, of one for each token or one for all."""
    return np.broadcast_to(values, trajectory.loss_mask.shape)[trajectory.loss_mask]


def split(batch: TrainBatch, minibatches: int, seed: int) -> list[list[Sample]]:
    """Splits whole groups into minibatches of nearly equal numbers of groups, shuffled by (seed, version) alone; fewer
    than `minibatches` where there are fewer groups, as in an epoch's last batch: an update needs a gradient."""
    if minibatches == 1:
        return [batch.samples]
    groups = np.unique(batch.group_ids)
    order = np.random.default_rng((seed, batch.version)).permutation(groups)
    parts = [set(part.tolist()) for part in np.array_split(order, max(1, min(minibatches, len(groups))))]
    return [[s for s, g in zip(batch.samples, batch.group_ids, strict=True) if int(g) in part] for part in parts]
