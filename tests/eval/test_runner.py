"""Evaluation with an engine that does as it is told: order, concurrency, failures, and what is written."""

import asyncio
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from areal_jax.data.config import DataConfig
from areal_jax.eval.report import Writer, summary_of, table
from areal_jax.eval.runner import EvaluationStopped, Evaluator, checkpoint_tensors
from areal_jax.rollout.engine import Completion, EngineDied, Sampling
from areal_jax.rollout.session import VerificationFailed
from areal_jax.rollout.workflows import SingleTurn
from areal_jax.transport.messages import Score


class Letters:
    """One token per character; 0 ends a text."""

    eos_token_id, chat_template = 0, None

    def encode(self, text, add_special_tokens=True):
        return list(map(ord, text))

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(t) for t in tokens if t)


class Oracle:
    """Answers with the problem's own text, the higher samples wrongly; the first problems take longest."""

    max_length = 64

    def __init__(self, right_up_to=2, dies_at=None):
        self.right_up_to, self.dies_at, self.requests, self.running, self.most = right_up_to, dies_at, [], 0, 0

    async def generate(self, request):
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        _, group, sample = request.key
        for _ in range(50 + 10 * group):
            await asyncio.sleep(0)
        self.running -= 1
        if group == self.dies_at:
            raise EngineDied("a test killed it")
        text = [*(request.tokens if sample < self.right_up_to else [ord("?")]), 0]
        ones = np.ones(len(text), np.float32)
        tokens = np.array(text, np.int32)
        return Completion(tokens=tokens, logprobs=-ones, versions=0 * tokens, finish_reason="stop")


class Same:
    """Right if the completion is the answer. Fails on the problems in `broken`, for so many calls each."""

    def __init__(self, broken=()):
        self.broken = dict(broken)

    async def verify(self, record, prompt, completion, prompt_tokens, completion_tokens):
        if self.broken.get(prompt, 0) > 0:
            self.broken[prompt] -= 1
            raise VerificationFailed("verifier_timeout", "it took too long")
        right = float(completion == record["answer"])
        return Score(request=0, reward=10 * right - 5, metrics={"accuracy": right, "length": float(len(completion))})


RECORDS = [{"prompt": text, "answer": text, "id": i} for i, text in enumerate(("one", "two", "three", "four"))]


def evaluate(engine=None, verifier=None, samples=3, each=lambda result: None, **settings):
    evaluator = Evaluator(
        engine=engine or Oracle(), workflow=SingleTurn(), tokenizer=Letters(), verifier=verifier or Same(),
        sampling=Sampling(max_new_tokens=20, temperature=0.7), data=DataConfig(), **settings,
    )  # fmt: skip
    return asyncio.run(asyncio.wait_for(evaluator.run(RECORDS, samples, each), 60))


def test_every_problem_is_asked_as_often_as_wanted_and_results_come_in_order():
    engine, told = Oracle(), []
    results = evaluate(engine, each=told.append, seed=5, concurrent=5)
    assert told == results and [r.index for r in results] == [0, 1, 2, 3]
    keys = {request.key for request in engine.requests}
    assert keys == {(5, -1 - i, k) for i in range(4) for k in range(3)} and len(engine.requests) == 12
    assert engine.most == 5
    for result in results:
        assert [s.accuracy for s in result.samples] == [1.0, 1.0, 0.0]
        assert [s.reward for s in result.samples] == [5.0, 5.0, -5.0]
        assert result.samples[0].completion == result.record["prompt"]
        assert result.samples[0].tokens == len(result.record["prompt"]) + 1


def test_a_failure_is_tried_again_then_named_and_never_a_score():
    results = evaluate(verifier=Same({"two": 2, "four": 100}), attempts=3, concurrent=1)
    assert [s.error for s in results[1].samples] == ["", "", ""]  # failed twice, then worked
    assert {s.error for s in results[3].samples} == {"verifier_timeout"} and results[3].scored == []
    summary = summary_of(results, [1, 2], ABOUT)
    assert (summary["failed"], summary["failures"]) == (3, {"verifier_timeout": 3})
    assert summary["problems_without_score"] == 1 and summary["samples"] == 9
    assert summary["accuracy"] == pytest.approx(2 / 3) == summary["estimates"]["pass@1"]["value"]
    assert "verifier_timeout" in table(summary) and "1 problems have no score" in table(summary)


def test_a_failure_may_end_the_evaluation():
    with pytest.raises(EvaluationStopped, match="problem 2: verifier_timeout: it took too long"):
        evaluate(verifier=Same({"three": 100}), stop_on_failure=True)


def test_a_broken_workflow_is_a_failure_with_its_message_and_a_dead_engine_ends_it():
    class Broken(SingleTurn):
        async def run(self, session, record):
            raise KeyError("nothing there")

    evaluator = Evaluator(
        engine=Oracle(), workflow=Broken(), tokenizer=Letters(), verifier=Same(), data=DataConfig(),
        sampling=Sampling(max_new_tokens=20),
    )  # fmt: skip
    [result, *_] = asyncio.run(evaluator.run(RECORDS, 1))
    assert result.samples[0].error == "workflow_error" and "nothing there" in result.samples[0].detail
    assert "estimates" not in summary_of([result], [1], ABOUT)
    with pytest.raises(EngineDied, match="a test killed it"):
        evaluate(Oracle(dies_at=-3))


ABOUT = {"model": "m", "data": "d", "engine": "jax", "temperature": 0.0, "seconds": 1.0}


def test_the_files_say_what_was_asked_answered_and_judged(tmp_path):
    writer = Writer(tmp_path / "out")
    results = evaluate(verifier=Same({"three": 99}), each=writer.problem)
    writer.close(summary_of(results, [1, 2], ABOUT))
    lines = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    assert [(line["index"], line["id"], line["right"], line["scored"]) for line in lines] == [
        (0, 0, 2, 3), (1, 1, 2, 3), (2, 2, 0, 0), (3, 3, 2, 3),
    ]  # fmt: skip
    assert lines[0]["samples"][0] == {
        "accuracy": 1.0, "reward": 5.0, "tokens": 4, "finish_reason": "stop", "completion": "one",
        "metrics": {"length": 3.0},
    }  # fmt: skip
    assert lines[2]["samples"][0] == {"error": "verifier_timeout", "detail": "it took too long"}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["estimates"]["pass@2"]["value"] == 1.0 and summary["metrics"]["length"] > 0


def test_an_evaluation_that_did_nothing_leaves_no_file(tmp_path):
    Writer(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_checkpoint_tensors_leave_out_a_tied_head(tmp_path):
    tensors = {"lm_head.weight": np.ones((2, 3), np.float32), "a": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    for tied, names in ((True, {"a"}), (False, {"a", "lm_head.weight"})):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        assert {name for name, _ in checkpoint_tensors(tmp_path)} == names
    with pytest.raises(ValueError, match="safetensors"):
        list(checkpoint_tensors(tmp_path / "nowhere"))


def test_checkpoint_tensors_are_those_of_the_network(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({"a": np.zeros(2, np.float32), name: np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "consolidated.safetensors")
    assert [name for name, _ in checkpoint_tensors(tmp_path)] == ["a"]
