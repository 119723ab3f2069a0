"""One evaluation: every problem some times through engine, workflow and verifiers.

Samples are made exactly as the evaluation inside a run makes them (same session, same keys of the random numbers), so
greedy results of the same weights are the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from areal_jax.data.config import DataConfig
from areal_jax.rollout.engine import Engine, EngineDied, Sampling
from areal_jax.rollout.session import Session, VerificationFailed, Verifier
from areal_jax.rollout.workflows import Workflow
from areal_jax.transport.messages import Task, Trajectory


class EvaluationStopped(RuntimeError):
    """A sample failed for good, and failures were to end the evaluation."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer: numbers of its last trajectory, or the name of the failure that left it without a score."""

    accuracy: float = 0.0
    reward: float = 0.0
    tokens: int = 0  # sampled
    finish_reason: str = ""
    completion: str = ""  # everything behind the prompt
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""  # not empty: there is no score
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """One problem and its samples."""

    index: int
    record: dict[str, Any]
    samples: list[Sample]

    @property
    def scored(self) -> list[Sample]:
        """The samples that could be judged."""
        return [sample for sample in self.samples if not sample.error]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation works with.

    Args:
      engine: started.
      attempts: how often a sample that fails is tried before its failure counts.
      stop_on_failure: a failure that counts ends the evaluation.
      concurrent: samples under way at once; more than the engine's slots, so that some are judged meanwhile.
    """

    engine: Engine
    workflow: Workflow
    tokenizer: Any
    verifier: Verifier
    sampling: Sampling
    data: DataConfig
    seed: int = 1
    attempts: int = 3
    stop_on_failure: bool = False
    concurrent: int = 128

    async def run(
        self, records: Sequence[dict], samples: int, each: Callable[[Result], None] = lambda result: None
    ) -> list[Result]:
        """Every record `samples` times; the results in order. `each` gets them in order too, as early as possible.

        Raises `EngineDied`, and `EvaluationStopped` if failures are to stop it.
        """
        answers: list[dict[int, Sample]] = [{} for _ in records]
        results: list[Result] = []
        jobs = ((index, k) for index in range(len(records)) for k in range(samples))

        async def work() -> None:
            for index, k in jobs:
                answers[index][k] = await self._sample(records[index], index, k)
                while len(results) < len(records) and len(answers[len(results)]) == samples:
                    i = len(results)
                    results.append(Result(i, records[i], [answers[i][k] for k in range(samples)]))
                    each(results[-1])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrent, len(records) * samples)):
                    group.create_task(work())
        except* (EngineDied, EvaluationStopped) as ends:
            raise ends.exceptions[0] from None
        return results

    async def _sample(self, record: dict, index: int, k: int) -> Sample:
        for attempt in range(1, self.attempts + 1):
            session = Session(
                engine=self.engine,
                tokenizer=self.tokenizer,
                verifier=self.verifier,
                sampling=self.sampling,
                task=Task(group=-1 - index, sample=k, record=record, attempt=attempt, evaluation=True),
                seed=self.seed,
                data=self.data,
            )
            try:
                trajectories = await self.workflow.run(session, record)
                return self._describe(trajectories[-1])
            except EngineDied:
                raise
            except VerificationFailed as failed:
                failure = Sample(error=failed.name, detail=failed.detail)
            except Exception as error:  # whatever a user's workflow raises
                failure = Sample(error="workflow_error", detail=f"{type(error).__name__}: {error}"[:2000])
        if self.stop_on_failure:
            raise EvaluationStopped(f"problem {index}: {failure.error}: {failure.detail}")
        return failure

    def _describe(self, last: Trajectory) -> Sample:
        metrics = dict(last.metrics)
        accuracy = metrics.pop("accuracy", float(last.reward > 0))  # as in a run's evaluation
        written = last.tokens[int(last.loss_mask.argmax()) :]
        return Sample(
            accuracy=accuracy,
            reward=last.reward,
            tokens=int(last.loss_mask.sum()),
            finish_reason=last.finish_reason,
            completion=self.tokenizer.decode(np.asarray(written).tolist(), skip_special_tokens=True),
            metrics=metrics,
        )


def checkpoint_tensors(folder: str | os.PathLike) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor that a checkpoint folder's network needs; a tied head is left out.

    Raises `ValueError` where weights are missing.
    """
    from areal_jax.models.config import ModelError  # which brings jax
    from areal_jax.models.files import is_redundant, weight_files

    try:
        files = weight_files(folder)
    except ModelError as error:
        raise ValueError(str(error)) from None
    tied = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    for path in files:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if not is_redundant(name, tied):
                    yield name, file.get_tensor(name)
