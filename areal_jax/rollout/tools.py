"""Tool use: the model writes Python between two markers, a sandbox runs it, and the model reads what it printed."""

from __future__ import annotations

import asyncio
import bisect
import concurrent.futures
import os
from typing import Any

import numpy as np

from areal_jax.rewards.folders import sweep_folders
from areal_jax.rewards.outcome import VerifierError
from areal_jax.rewards.sandbox import Limits, RunResult, run_script
from areal_jax.rollout.session import Session, Transcript, VerificationFailed
from areal_jax.rollout.workflows import metrics_of
from areal_jax.transport.messages import Trajectory


class ToolUse:
    """One answer with calls of Python in between; their outputs are tokens that are seen but not trained on.

    A call stands between `open` and `close`; the model's turn is cut right behind `close`. (Where `close` is one
    token it stops generation. Else what was sampled behind it is thrown away, which changes no distribution: whether
    a token is kept depends on those before it alone.) The verifier judges everything behind the prompt; all turns
    together may have `max_new_tokens` sampled tokens.

    Args:
      open, close: markers around a program.
      output: what the model reads afterwards; `{output}` is what the program printed, or its error.
      max_calls: calls per sample; further ones are not run.
      max_output_tokens: longer outputs are cut.
      timeout: seconds of CPU per call (and four times as many of wall time).
    """

    def __init__(
        self,
        open: str = "```python\n",
        close: str = "```",
        output: str = "\n```output\n{output}\n```\n",
        max_calls: int = 4,
        max_output_tokens: int = 256,
        timeout: int = 5,
    ):
        if not open or not close or "{output}" not in output:
            raise ValueError("open and close must not be empty, and output must contain {output}")
        self.open, self.close, self.output = open, close, output
        self.max_calls, self.max_output_tokens = max_calls, max_output_tokens
        self.limits = Limits(cpu_seconds=timeout, wall_seconds=4.0 * timeout)
        sweep_folders()  # of a worker that was killed while a program ran
        self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "tool")

    async def run(self, session: Session, record: dict[str, Any]) -> list[Trajectory]:
        prompt = session.encode(record)
        transcript, budget, calls, errors = Transcript(prompt), session.sampling.max_new_tokens, 0, 0
        ends = session.sampling.stop_token_ids
        written = prompt[:0]  # since the prompt or the last output
        while True:
            stops = ends + self._closing_token(session) * (calls < self.max_calls)
            limits = self._limits(session, budget)
            completion = await session.generate(transcript.tokens, **limits, stop_token_ids=stops)
            written = np.concatenate([written, completion.tokens])
            found = self._find_call(session, written) if calls < self.max_calls else None
            program, length = found or ("", len(written))
            kept = len(completion.tokens) - (len(written) - length)
            transcript.sampled(completion, kept)
            budget -= kept
            last = int(completion.tokens[kept - 1])
            paused = found is not None or (last in stops and last not in ends)
            finish_reason = "length" if paused else completion.finish_reason
            if not paused or budget <= 0 or session.room(transcript.tokens) <= 1:
                break
            if found is None:  # the closing marker's token, but nothing to close: the model goes on
                continue
            with session.busy("tool"):
                result = await self._call(program)
            calls, errors = calls + 1, errors + bool(result.reason)
            output = self._output_tokens(session, result)
            if session.room(transcript.tokens) <= len(output):
                break
            transcript.give(output)
            written = prompt[:0]
        score = await session.verify(prompt, transcript.tokens[len(prompt) :], record)
        metrics = metrics_of(score, tool_calls=float(calls), tool_errors=float(errors))
        return [transcript.trajectory(score.reward, metrics, finish_reason)]

    def _closing_token(self, session: Session) -> tuple[int, ...]:
        close = session.encode_text(self.close).tolist()
        return tuple(close) if len(close) == 1 else ()

    def _limits(self, session: Session, budget: int) -> dict[str, int]:
        used = session.sampling.max_new_tokens - budget
        return {"max_new_tokens": budget, "min_new_tokens": max(0, session.sampling.min_new_tokens - used)}

    def _output_tokens(self, session: Session, result: RunResult) -> np.ndarray:
        head, tail = self.output.split("{output}")
        text = head + _what_it_said(result)[: 16 * self.max_output_tokens]
        return np.concatenate([session.encode_text(text)[: self.max_output_tokens], session.encode_text(tail)])

    def _find_call(self, session: Session, tokens: np.ndarray) -> tuple[str, int] | None:
        """The first program in `tokens`, and how many of them there are up to the end of its closing marker."""

        def text(n: int) -> str:
            return session.tokenizer.decode(tokens[:n].tolist(), skip_special_tokens=False)

        whole = text(len(tokens))
        start = whole.find(self.open)
        end = whole.find(self.close, start + len(self.open)) if start >= 0 else -1
        if end < 0:
            return None
        length = bisect.bisect_left(range(len(tokens)), end + len(self.close), key=lambda n: len(text(n)))
        return whole[start + len(self.open) : end], length

    async def _call(self, program: str) -> RunResult:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: run_script(program, limits=self.limits))
        except VerifierError as error:
            raise VerificationFailed("sandbox_unavailable", str(error)) from error


def _what_it_said(result: RunResult) -> str:
    """Output, and for a failure the last line of its error and what ended it."""
    failure = [*result.stderr.strip().splitlines()[-1:], result.reason] if result.reason else []
    return "\n".join(part for part in (result.stdout.strip(), *failure) if part)
