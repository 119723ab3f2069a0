"""Episodes of several turns on the embedded engine, with new weights inside and between the turns."""

import asyncio

import numpy as np
from engines import MODEL, STOP, VOCABULARY, SteppedEngine, make_engine, manifest, params_of
from test_tools import Echo

from areal_jax.data.config import DataConfig
from areal_jax.rollout.engine import Sampling
from areal_jax.rollout.session import Session
from areal_jax.rollout.workflows import MultiTurn
from areal_jax.transport.messages import Score, Task
from tests.models import tiny

LETTERS = "_abcdefghijklmnop"
assert len(LETTERS) == VOCABULARY


class Letters:
    """One token per letter; "_" ends a turn."""

    eos_token, eos_token_id, chat_template = "_", STOP, None

    def encode(self, text, add_special_tokens=True):
        return [LETTERS.index(c) for c in text]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(LETTERS[t] for t in tokens if t or not skip_special_tokens)


class HasK:
    async def verify(self, record, prompt, completion, prompt_tokens, completion_tokens):
        return Score(request=0, reward=float("k" in completion))


class Recorder:
    """An engine that remembers what it gave out."""

    def __init__(self, engine):
        self.engine, self.max_length, self.given = engine, engine.max_length, []

    async def generate(self, request):
        completion = await self.engine.generate(request)
        self.given.append((request, completion))
        return completion


def run_episodes(workflow, stops=(STOP,), count=10):
    engine = make_engine(SteppedEngine, max_length=64, updates={3: 1, 6: 2, 10: 3, 15: 4})

    async def episode(i):
        recorder = Recorder(engine)
        session = Session(
            engine=recorder, tokenizer=Letters(), verifier=HasK(),
            sampling=Sampling(max_new_tokens=40, stop_token_ids=stops),
            task=Task(group=i, sample=0, record={}), seed=1, data=DataConfig(),
        )  # fmt: skip
        [trajectory] = await workflow.run(session, {"prompt": "abc"[: 1 + i % 3]})
        return trajectory, recorder.given

    async def main():
        await engine.start(manifest(0))
        try:
            return await asyncio.gather(*(episode(i) for i in range(count)))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), 120))


def check(trajectory, given):
    """What is trained on is what the engine sampled, token for token, and each log-prob is that of its version."""
    expected = np.zeros(len(trajectory.tokens), bool)
    for request, completion in given:
        start = len(request.tokens)
        n = min(len(completion.tokens), int(np.argmin([*trajectory.loss_mask[start:], False])))
        where = slice(start, start + n)
        np.testing.assert_array_equal(trajectory.tokens[:start], request.tokens)
        for name in ("tokens", "logprobs", "versions"):
            np.testing.assert_array_equal(getattr(trajectory, name)[where], getattr(completion, name)[:n])
        expected[where] = True
    np.testing.assert_array_equal(trajectory.loss_mask, expected)
    versions = trajectory.versions[expected]
    assert (np.diff(versions) >= 0).all()
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(trajectory.tokens)] = trajectory.tokens
    segments = (np.arange(64) < len(trajectory.tokens)).astype(np.int32)[None]
    for version in set(versions.tolist()):
        positions = np.arange(64, dtype=np.int32)[None]
        scored, _ = score(params_of(version), padded, positions, segments, np.float32(1.0))
        mine = trajectory.versions == version
        np.testing.assert_allclose(trajectory.logprobs[mine], np.asarray(scored)[0, : len(mine)][mine], atol=1e-4)


score = tiny.jit(MODEL.token_logprobs)


def test_several_turns_across_several_versions():
    episodes = run_episodes(MultiTurn(max_turns=3, feedback="nope"))
    for trajectory, given in episodes:
        check(trajectory, given)
    assert max(len(given) for _, given in episodes) == 3
    assert max(len(set(t.versions[t.loss_mask].tolist())) for t, _ in episodes) >= 3
    between = [g[0][1].versions[-1] < g[1][1].versions[0] for _, g in episodes if len(g) > 1]
    assert any(between)  # an update between two turns, too


def test_tool_calls_across_several_versions():
    episodes = run_episodes(Echo(open="j", close="g", output="e{output}e", max_output_tokens=3), stops=())
    for trajectory, given in episodes:
        check(trajectory, given)
    assert any(t.metrics["tool_calls"] >= 2 for t, _ in episodes)
    assert any(len(set(t.versions[t.loss_mask].tolist())) >= 2 and t.metrics["tool_calls"] for t, _ in episodes)
