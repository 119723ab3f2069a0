"""Workflows: what is trained on is exactly what the model sampled, in the order in which it saw everything."""

import asyncio

import numpy as np
import pytest
from worlds import Characters, ScriptedEngine

from areal_jax.data.config import DataConfig
from areal_jax.rollout.engine import Completion, Sampling
from areal_jax.rollout.session import Session, Transcript, VerificationFailed
from areal_jax.rollout.workflows import MultiTurn, SingleTurn, load_workflow
from areal_jax.transport.messages import Score, Task


class Judge:
    """Right is what contains the record's answer."""

    def __init__(self):
        self.asked = []

    async def verify(self, record, prompt, completion, prompt_tokens, completion_tokens):
        self.asked.append((prompt, completion))
        if "broken" in record:
            raise VerificationFailed("verifier_crash", "a test said so")
        right = float(record["answer"] in completion)
        return Score(request=0, reward=2 * right - 1, metrics={"accuracy": right})


def session_with(script, *, chat=False, judge=None, version=4, **sampling):
    engine = ScriptedEngine(script)
    engine.version = version
    return engine, Session(
        engine=engine,
        tokenizer=Characters(chat),
        verifier=judge or Judge(),
        sampling=Sampling(**({"max_new_tokens": 50, "stop_token_ids": (0,)} | sampling)),
        task=Task(group=3, sample=1, record={}),
        seed=5,
        data=DataConfig(),
    )


def check_against_requests(trajectory, requests):
    """The mask is True exactly on what followed each request's tokens, up to the next request's."""
    ends = [*(len(r.tokens) for r in requests[1:]), len(trajectory.tokens)]
    for request in requests:
        np.testing.assert_array_equal(trajectory.tokens[: len(request.tokens)], request.tokens)
    given = np.ones(len(trajectory.tokens), bool)
    for request, end in zip(requests, ends):
        start = len(request.tokens)
        n = 0
        while start + n < end and trajectory.loss_mask[start + n]:
            n += 1
        assert n > 0
        given[start : start + n] = False
    np.testing.assert_array_equal(trajectory.loss_mask, ~given)
    assert (trajectory.versions[given] == -1).all() and (trajectory.logprobs[given] == 0).all()
    assert (trajectory.versions[~given] >= 0).all() and (trajectory.logprobs[~given] < 0).all()


def test_single_turn():
    engine, session = session_with(lambda prompt: "it is 42\0")
    [t] = asyncio.run(SingleTurn().run(session, {"prompt": "what?", "answer": "42"}))
    check_against_requests(t, engine.requests)
    assert session.tokenizer.decode(t.tokens[t.loss_mask].tolist()) == "it is 42<end>"
    assert (t.reward, t.metrics, t.finish_reason) == (1.0, {"accuracy": 1.0}, "stop")


def answers(*texts):
    """One after the other."""
    rest = list(texts)
    return lambda prompt: rest.pop(0)


def test_multi_turn_tries_again_and_discounts():
    judge = Judge()
    engine, session = session_with(answers("41\0", "43\0", "42\0"), judge=judge)
    [t] = asyncio.run(MultiTurn(discount=0.5, feedback=" no! ").run(session, {"prompt": "q?", "answer": "42"}))
    text = session.tokenizer.decode(t.tokens.tolist())
    assert text == "q?41<end> no! 43<end> no! 42<end>"
    check_against_requests(t, engine.requests)
    assert session.tokenizer.decode(t.tokens[t.loss_mask].tolist()) == "41<end>43<end>42<end>"
    assert t.reward == 0.25 and t.metrics == {"accuracy": 1.0, "turns": 3.0}
    assert [completion for _, completion in judge.asked] == ["41", "43", "42"]
    assert {r.key for r in engine.requests} == {(5, 3, 1)}
    starts = [len(r.tokens) for r in engine.requests]
    assert starts == sorted(set(starts))  # the random numbers of a turn are those of its own positions


def test_multi_turn_uses_the_chat_template_between_turns_without_repeating_the_stop_token():
    engine, session = session_with(answers("41\0", "42\0"), chat=True)
    [t] = asyncio.run(MultiTurn(feedback="no!").run(session, {"prompt": "q?", "answer": "42"}))
    assert session.tokenizer.decode(t.tokens.tolist()) == (
        "[user]q?<end>\n[assistant]41<end>\n[user]no!<end>\n[assistant]42<end>"
    )
    check_against_requests(t, engine.requests)


@pytest.mark.parametrize("texts, settings, turns", [
    (["41\0"] * 3, {"max_turns": 2}, 2),
    (["42\0"], {}, 1),
    (["41 and no end"], {}, 1),  # cut off: there is nothing to reply to
    (["41\0"], {"feedback": "x" * 500}, 1),  # no room for another try
])  # fmt: skip
def test_multi_turn_ends(texts, settings, turns):
    engine, session = session_with(answers(*texts), max_new_tokens=9)
    [t] = asyncio.run(MultiTurn(**settings).run(session, {"prompt": "q?", "answer": "42"}))
    assert len(engine.requests) == turns == t.metrics["turns"]
    assert t.loss_mask[-1]
    check_against_requests(t, engine.requests)


def test_verifier_failures_pass_through():
    _, session = session_with(lambda prompt: "42\0")
    for workflow in (SingleTurn(), MultiTurn()):
        with pytest.raises(VerificationFailed, match="verifier_crash"):
            asyncio.run(workflow.run(session, {"prompt": "q", "answer": "42", "broken": True}))


def test_what_the_model_wrote_is_never_tokenised_again():
    """Tokens that no tokenizer would produce for their text survive turns untouched."""
    transcript = Transcript(np.asarray([1, 2], np.int32))
    odd = np.asarray([7, 7, 0], np.int32)
    columns = {"logprobs": np.full(3, -1.0, np.float32), "versions": np.asarray([2, 2, 3], np.int32)}
    transcript.sampled(Completion(tokens=odd, finish_reason="stop", **columns))
    transcript.give(np.asarray([5], np.int32))
    transcript.sampled(Completion(tokens=odd, finish_reason="stop", **columns), length=2)
    t = transcript.trajectory(1, {}, "stop")
    assert t.tokens.tolist() == [1, 2, 7, 7, 0, 5, 7, 7] and t.oldest_version == 2
    assert t.versions.tolist() == [-1, -1, 2, 2, 3, -1, 2, 2]
    assert t.loss_mask.dtype == np.bool_ and t.tokens.dtype == t.versions.dtype == np.int32
    assert t.logprobs.dtype == np.float32


def test_workflows_by_import_path():
    workflow = load_workflow("areal_jax.rollout.workflows:MultiTurn", {"max_turns": 5})
    assert workflow.max_turns == 5
    for path, arguments, text in [
        ("areal_jax.rollout.workflows.MultiTurn", {}, "package.module:Class"),
        ("areal_jax.rollout.workflows:Missing", {}, "Missing"),
        ("no_such_module:X", {}, "no_such_module"),
        ("areal_jax.rollout.workflows:MultiTurn", {"max_turns": 0}, "max_turns"),
        ("areal_jax.rollout.workflows:MultiTurn", {"turns": 2}, "turns"),
        ("areal_jax.transport.messages:Task", {"group": 0, "sample": 0, "record": {}}, "run"),
    ]:
        with pytest.raises(ValueError, match=text):
            load_workflow(path, arguments)
