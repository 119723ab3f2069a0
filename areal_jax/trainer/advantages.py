"""Advantages of a whole batch by the name of their estimator, always computed in the same few shapes."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from areal_jax import advantages
from areal_jax.config import one_line
from areal_jax.trainer.objectives import ObjectiveError, check_args, check_known
from areal_jax.transport.messages import Trajectory

ESTIMATORS: dict[str, Callable[..., jax.Array]] = {
    "group_relative": advantages.group_relative,
    "leave_one_out": advantages.leave_one_out,
    "asymre": advantages.asymre,
    "reinforce_plus_plus": advantages.reinforce_plus_plus,
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
}
_GIVEN = {"rewards", "group_ids", "num_groups", "mask", "segment_ids"}


def check(name: str, args: dict[str, Any]) -> None:
    """Raises `ObjectiveError` (a `ValueError`) unless estimator `name` exists and takes `args`; needs no device."""
    function = check_known("trainer.advantage", name, ESTIMATORS)
    check_args("trainer.advantage_args", name, function, args, given=_GIVEN)
    names = inspect.signature(function).parameters
    kinds = {"rewards": ((2,) if "group_ids" in names else (2, 3), np.float32), "group_ids": ((2,), np.int32)}
    kinds["mask"] = (2, 3), np.bool_
    arrays = {n: jax.ShapeDtypeStruct(*kind) for n, kind in kinds.items() if n in names}
    static = {"num_groups": 1} if "num_groups" in names else {}
    try:
        jax.eval_shape(lambda arrays: function(**arrays, **static, **args), arrays)
    except (TypeError, ValueError) as error:  # an argument's value: a text for a number, an unknown choice
        raise ObjectiveError(f"trainer.advantage_args={args} cannot be computed with: {one_line(error)}") from None


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
    """An estimator of the library, called with arrays of one fixed shape so that it compiles once.

    Args:
      name: one of ESTIMATORS.
      args: its keyword arguments.
      groups: groups in a batch at most.
      samples: trajectories in a batch as a rule; a batch with more is padded to the next multiple.
      length: tokens of the longest trajectory, for the estimators that look at tokens.
    """

    name: str
    args: dict[str, Any]
    groups: int
    samples: int
    length: int

    def __post_init__(self):
        check(self.name, self.args)

    def __call__(self, trajectories: Sequence[Trajectory], group_ids: np.ndarray) -> list[np.ndarray]:
        """The advantage of every trajectory: float32 `[]`, or `[T]` from an estimator of tokens."""
        function = ESTIMATORS[self.name]
        names = inspect.signature(function).parameters
        count = len(trajectories)
        padded = max(1, -(-count // self.samples)) * self.samples
        groups = -(-max(1, int(np.max(group_ids, initial=-1)) + 1) // self.groups) * self.groups
        rewards = np.zeros(padded, np.float32)
        rewards[:count] = [t.reward for t in trajectories]
        ids = np.full(padded, -1, np.int32)
        ids[:count] = group_ids
        arrays: dict[str, Any] = {"rewards": rewards, "group_ids": ids, "num_groups": groups}
        if "mask" in names:
            mask = np.zeros((padded, self.length), bool)
            for i, t in enumerate(trajectories):
                mask[i, : len(t.tokens)] = t.loss_mask
            arrays["mask"] = mask
            if "group_ids" not in names:  # rewards of tokens: the outcome on the last trained one
                last = self.length - 1 - np.argmax(mask[:, ::-1], axis=1)
                arrays["rewards"] = np.where(np.arange(self.length) == last[:, None], rewards[:, None], 0).astype("f4")
        given = {n: x for n, x in arrays.items() if n in names}
        static = given.pop("num_groups", None)
        values = np.asarray(_estimate(self.name, tuple(sorted(self.args.items())), static, given))
        if values.ndim == 1:
            return list(values[:count])
        return [values[i, : len(t.tokens)] for i, t in enumerate(trajectories)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _estimate(name: str, args: tuple, num_groups: int | None, arrays: dict[str, jax.Array]) -> jax.Array:
    static = {} if num_groups is None else {"num_groups": num_groups}
    return ESTIMATORS[name](**arrays, **static, **dict(args))
