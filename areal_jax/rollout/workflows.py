"""How one sample comes about: a workflow is a coroutine from a record to the trajectories to train on.

A user's own is any class with such a `run`, named by its import path in `rollout.workflow`; `rollout.workflow_args` are
its keyword arguments. It is made once per worker and runs many samples at the same time.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Protocol

from areal_jax.rollout.session import Session, Transcript
from areal_jax.transport.messages import Score, Trajectory


class Workflow(Protocol):
    """One sample: ask the model and the verifiers through `session`, return what to train on.

    Let exceptions pass: they are counted under their names, and the sample is tried again or dropped as the settings
    say. Return at least one trajectory with at least one sampled token.
    """

    async def run(self, session: Session, record: dict[str, Any]) -> list[Trajectory]: ...


def load_workflow(path: str, arguments: dict[str, Any]) -> Workflow:
    """The workflow that an import path ("package.module:Class") names; raises `ValueError` in one line."""
    try:
        workflow = _class(path)(**arguments)
    except Exception as error:  # a user's class may raise anything
        raise _unusable(path, error) from error
    if not callable(getattr(workflow, "run", None)):
        raise _without_run(path)
    return workflow


def check_workflow(path: str, arguments: dict[str, Any]) -> None:
    """Raises `ValueError` where `load_workflow` would, as far as that is known before a user's class is made.

    Only a worker makes one: it may start things, or take a GPU's memory.
    """
    if path.startswith("areal_jax."):
        load_workflow(path, arguments)
        return
    try:
        made = _class(path)
        inspect.signature(made).bind(**arguments)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise _unusable(path, error) from error
    if isinstance(made, type) and not callable(getattr(made, "run", None)):
        raise _without_run(path)


def _class(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise ValueError("write it as package.module:Class")
    return getattr(importlib.import_module(module), name)


def _without_run(path: str) -> ValueError:
    return ValueError(f"rollout.workflow {path!r} has no method 'run(session, record)'")


def _unusable(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"rollout.workflow {path!r} cannot be made with these rollout.workflow_args: {type(error).__name__}: {error}"
    )


def metrics_of(score: Score, **more: float) -> dict[str, float]:
    """The score's named numbers, "accuracy" among them (the reward where the verifier does not say), and `more`."""
    return {"accuracy": score.reward} | score.metrics | more


class SingleTurn:
    """Reinforcement learning with verifiable rewards: one prompt, one completion, one score."""

    async def run(self, session: Session, record: dict[str, Any]) -> list[Trajectory]:
        prompt = session.encode(record)
        completion = await session.generate(prompt)
        score = await session.verify(prompt, completion.tokens, record)
        transcript = Transcript(prompt)
        transcript.sampled(completion)
        return [transcript.trajectory(score.reward, metrics_of(score), completion.finish_reason)]


class MultiTurn:
    """Tries again after feedback until the answer is right; the reward is discounted for every try that failed.

    Args:
      max_turns: tries at most.
      discount: factor on the reward per failed try.
      feedback: what the model is told after a wrong answer.
      right: accuracy from which an answer counts as right.
    """

    def __init__(
        self,
        max_turns: int = 3,
        discount: float = 0.9,
        feedback: str = "Your answer is wrong. Check your reasoning and try again.",
        right: float = 1.0,
    ):
        if max_turns < 1 or not 0 <= discount <= 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1, and discount={discount} between 0 and 1")
        self.max_turns, self.discount, self.feedback, self.right = max_turns, discount, feedback, right

    async def run(self, session: Session, record: dict[str, Any]) -> list[Trajectory]:
        transcript = Transcript(session.encode(record))
        for turn in range(1, self.max_turns + 1):
            before = transcript.tokens
            completion = await session.generate(before)
            transcript.sampled(completion)
            score = await session.verify(before, completion.tokens, record)
            metrics = metrics_of(score, turns=float(turn))
            if metrics["accuracy"] >= self.right or turn == self.max_turns or completion.finish_reason != "stop":
                break
            reply = session.encode_reply(self.feedback, record, stopped=True)
            if session.room(transcript.tokens) <= len(reply):
                break
            transcript.give(reply)
        reward = score.reward * self.discount ** (turn - 1)
        return [transcript.trajectory(reward, metrics, completion.finish_reason)]
