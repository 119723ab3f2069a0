"""The reward recipe judged in this process's own pool: what a run's rollout workers ask the reward service for."""

from __future__ import annotations

from areal_jax.rewards.compose import Recipe, judge
from areal_jax.rewards.outcome import Failure
from areal_jax.rewards.pool import VerifierPool
from areal_jax.rewards.service import fields_of, reply_to
from areal_jax.rollout.session import VerificationFailed
from areal_jax.transport.messages import Score, Verify


class LocalVerifier:
    """A `session.Verifier` on a pool; the fields a verifier may take, and the score, are the reward service's."""

    def __init__(self, pool: VerifierPool, recipe: Recipe):
        self._pool, self._recipe = pool, recipe

    async def verify(
        self, record: dict, prompt: str, completion: str, prompt_tokens: list[int], completion_tokens: list[int]
    ) -> Score:
        """Raises `VerificationFailed` under the same names as in a run ("verifier_timeout", ...)."""
        question = Verify(
            request=0, record=record, prompt=prompt, completion=completion,
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        )  # fmt: skip
        outcome = await judge(self._pool, self._recipe, fields_of(question))
        if isinstance(outcome, Failure):
            raise VerificationFailed(f"verifier_{outcome.kind}", outcome.text)
        return reply_to(question, outcome)
