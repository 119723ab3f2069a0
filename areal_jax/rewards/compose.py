"""Several verifiers, one reward: weights, scaling and shaping, kept apart from the accuracy that is reported."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from areal_jax.rewards.outcome import Failure, Outcome, Score
from areal_jax.rewards.pool import VerifierPool
from areal_jax.rewards.shaping import overlong_penalty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verifier:
    """One verifier of a recipe: its import path, its weight in the sum, and keyword arguments of its own."""

    path: str
    weight: float = 1.0
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name, which its numbers are reported under."""
        return self.path.replace(":", ".").rpartition(".")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How scores become the trained reward.

    reward = (sum of weight · score + overlong_factor · overlong penalty + offset) · scale. AReaL's +5 for right and -5
    for wrong is scale 10 and offset -0.5 on scores of 0 and 1. The accuracy is the first verifier's, untouched.
    """

    verifiers: tuple[Verifier, ...]
    scale: float = 1.0
    offset: float = 0.0
    overlong_max: int = 0  # tokens; 0: no penalty
    overlong_buffer: int = 0
    overlong_factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.verifiers:
            raise ValueError("a recipe needs at least one verifier")
        names = [verifier.name for verifier in self.verifiers]
        if len(set(names)) < len(names):
            raise ValueError(f"two verifiers have the same name, under which they report: {names}; rename one")
        overlong_penalty(0, max_length=self.overlong_max, buffer=self.overlong_buffer)


def combine(scores: Sequence[Score], recipe: Recipe, length: int) -> Score:
    """The one `Score` that the verifiers' `scores` come to, for a completion of `length` tokens.

    The named numbers of the first verifier keep their names; of the others they are called verifier/name.
    """
    penalty = overlong_penalty(length, max_length=recipe.overlong_max, buffer=recipe.overlong_buffer)
    weighted = sum(verifier.weight * score.reward for verifier, score in zip(recipe.verifiers, scores, strict=True))
    values = dict(scores[0].values)
    if recipe.overlong_max:
        values["overlong_penalty"] = penalty
    if len(scores) > 1:
        for verifier, score in zip(recipe.verifiers, scores, strict=True):
            values[f"{verifier.name}/reward"] = score.reward
    for verifier, score in list(zip(recipe.verifiers, scores, strict=True))[1:]:
        values |= {f"{verifier.name}/{name}": number for name, number in score.values.items()}
        values[f"{verifier.name}/accuracy"] = score.accuracy
    return Score(
        reward=(weighted + recipe.overlong_factor * penalty + recipe.offset) * recipe.scale,
        accuracy=scores[0].accuracy,
        values=values,
        reason=next((score.reason for score in scores if score.reason), ""),
        seconds=max(score.seconds for score in scores),
    )


async def judge(pool: VerifierPool, recipe: Recipe, fields: Mapping[str, Any]) -> Outcome:
    """Runs all verifiers of `recipe` at once on `fields` (`completion_tokens` among them).

    One verifier that fails makes the whole a `Failure`: a sum that lacks a term is not a reward.
    """
    calls = [pool.submit(verifier.path, {**fields, **verifier.arguments}) for verifier in recipe.verifiers]
    outcomes = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)  # a task each would cost more
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failed:
        more = f" (and {len(failed) - 1} more verifiers failed)" if len(failed) > 1 else ""
        return msgspec.structs.replace(failed[0], text=failed[0].text + more)
    return combine(outcomes, recipe, len(fields["completion_tokens"]))
