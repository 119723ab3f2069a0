"""What a workflow gets to work with: one sample's view of tokenizer, engine and verifiers, and a transcript."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from areal_jax.data.config import DataConfig
from areal_jax.data.prompts import Prompts, use_chat
from areal_jax.rollout.engine import Completion, Engine, Request, Sampling
from areal_jax.transport.messages import Score, Task, Trajectory


class VerificationFailed(RuntimeError):
    """A completion could not be judged: an infrastructure failure with a short `name`, never a score."""

    def __init__(self, name: str, detail: str = ""):
        super().__init__(f"{name}: {detail}" if detail else name)
        self.name, self.detail = name, detail


class Verifier(Protocol):
    """Who judges: the reward services."""

    async def verify(
        self, record: dict, prompt: str, completion: str, prompt_tokens: list[int], completion_tokens: list[int]
    ) -> Score:
        """Raises `VerificationFailed`."""


@contextmanager
def _untimed(activity: str) -> Iterator[None]:
    yield


class Session:
    """One sample's access to the system; made by the worker, given to `Workflow.run`.

    Random numbers are fixed by (run seed, group, sample) and a token's position, so a later turn of the same sample,
    which starts at a later position, never meets the numbers of an earlier one.

    Args:
      sampling: the run's defaults for training, or for evaluation if `task.evaluation`.
      busy: `with busy(activity):` tells the worker's clock what the sample waits for.
      prompts: renders records for this tokenizer and these data settings; shared by the samples of a group.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        tokenizer: Any,
        verifier: Verifier,
        sampling: Sampling,
        task: Task,
        seed: int,
        data: DataConfig,
        busy: Callable[[str], AbstractContextManager] = _untimed,
        prompts: Prompts | None = None,
    ):
        self.tokenizer, self.sampling, self.data = tokenizer, sampling, data
        self.evaluation = task.evaluation
        self.max_length = engine.max_length
        self.busy = busy
        self._engine, self._verifier = engine, verifier
        self._key = (seed, task.group, task.sample)
        self._prompts = prompts or Prompts(tokenizer, data)

    def encode(self, record: dict) -> np.ndarray:
        """int32 tokens of the record's prompt, with the chat template where the data settings say so."""
        return self._prompts.tokens(record)

    def encode_text(self, text: str) -> np.ndarray:
        """int32 tokens of `text` alone, without special tokens around it."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def encode_reply(self, text: str, record: dict, stopped: bool) -> np.ndarray:
        """int32 tokens of a user's turn `text` that follows what the model wrote, up to where the model goes on.

        `stopped`: the model's turn ended with its stop token, which then is not repeated. Without a chat template it
        is `text` alone.
        """
        if not use_chat(self.tokenizer, self.data, record):
            return self.encode_text(text)
        mark = "\u2063answer\u2063"  # rendered once, to find out what the template puts behind an answer
        turns = [("user", "question"), ("assistant", mark), ("user", text)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        _, found, behind = rendered.partition(mark)
        if not found:
            raise ValueError("several turns need a chat template that keeps the assistant's text as it is")
        end = self.tokenizer.eos_token or ""
        if stopped and end and behind.startswith(end):
            behind = behind[len(end) :]
        return self.encode_text(behind)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens`, special tokens left out."""
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def room(self, tokens: np.ndarray) -> int:
        """How many more tokens fit behind `tokens`."""
        return self.max_length - len(tokens)

    async def generate(self, tokens: np.ndarray, **overrides: Any) -> Completion:
        """Continue `tokens` with the run's sampling settings, some of them replaced (fields of `Sampling`)."""
        sampling = dataclasses.replace(self.sampling, **overrides)
        with self.busy("generating"):
            return await self._engine.generate(Request(tokens=tokens, sampling=sampling, key=self._key))

    async def verify(self, prompt_tokens: np.ndarray, completion_tokens: np.ndarray, record: dict) -> Score:
        """Judge a completion; raises `VerificationFailed`, which a workflow should let pass."""
        with self.busy("verifying"):
            return await self._verifier.verify(
                record,
                self.decode(prompt_tokens),
                self.decode(completion_tokens),
                np.asarray(prompt_tokens).tolist(),
                np.asarray(completion_tokens).tolist(),
            )


class Transcript:
    """The tokens of one episode in the order in which the model saw them, and which of them it sampled itself.

    What the model wrote is kept as the tokens that it sampled, never as text to be tokenised again.
    """

    def __init__(self, prompt: np.ndarray):
        self._parts: list[tuple[np.ndarray, Completion | None]] = []
        self.give(prompt)

    def give(self, tokens: np.ndarray) -> None:
        """Append tokens that come from outside: a prompt, feedback, a tool's output. They are not trained on."""
        self._parts.append((np.asarray(tokens, np.int32), None))

    def sampled(self, completion: Completion, length: int | None = None) -> None:
        """Append what the model sampled, or its first `length` tokens."""
        n = len(completion.tokens) if length is None else length
        cut = {name: getattr(completion, name)[:n] for name in ("tokens", "logprobs", "versions")}
        self._parts.append((cut["tokens"], dataclasses.replace(completion, **cut)))

    @property
    def tokens(self) -> np.ndarray:
        """int32 `[T]`, all of them."""
        return np.concatenate([tokens for tokens, _ in self._parts])

    def trajectory(self, reward: float, metrics: dict[str, float], finish_reason: str) -> Trajectory:
        """What is trained on; the masks follow from who wrote what."""

        def column(dtype, given, of_completion) -> np.ndarray:
            return np.concatenate([
                np.full(len(tokens), given, dtype) if completion is None else of_completion(completion).astype(dtype)
                for tokens, completion in self._parts
            ])  # fmt: skip

        return Trajectory(
            tokens=self.tokens,
            loss_mask=column(np.bool_, False, lambda c: np.ones(len(c.tokens))),
            logprobs=column(np.float32, 0.0, lambda c: c.logprobs),
            versions=column(np.int32, -1, lambda c: c.versions),
            reward=float(reward),
            finish_reason=finish_reason,
            metrics=metrics,
        )
