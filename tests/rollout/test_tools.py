"""Tool use: programs are run where the model wrote them, outputs are seen but never trained on."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from test_workflows import Judge, answers, check_against_requests, session_with

from areal_jax.rewards.sandbox import RunResult, works
from areal_jax.rollout.tools import ToolUse

MARKS = {"open": "<py>", "close": "</py>", "output": "<out>{output}</out>"}


class Echo(ToolUse):
    """Needs no sandbox: a program's output is the program, twice."""

    async def _call(self, program):
        reason = "timeout" if "loop" in program else ""
        return RunResult(reason, program * 2, "", 0.1)


def test_the_output_follows_the_program_and_is_not_trained_on():
    judge = Judge()
    texts = answers("let me see <py>7</py> which is", "now <py>x</py>", "42\0")
    engine, session = session_with(texts, judge=judge, max_new_tokens=150)
    [t] = asyncio.run(Echo(**MARKS).run(session, {"prompt": "q?", "answer": "42"}))
    text = session.tokenizer.decode(t.tokens.tolist())
    assert text == "q?let me see <py>7</py><out>77</out>now <py>x</py><out>xx</out>42<end>"
    trained = session.tokenizer.decode(t.tokens[t.loss_mask].tolist())
    assert trained == "let me see <py>7</py>now <py>x</py>42<end>"
    check_against_requests(t, engine.requests)
    assert t.metrics == {"accuracy": 1.0, "tool_calls": 2.0, "tool_errors": 0.0} and t.finish_reason == "stop"
    [(prompt, completion)] = judge.asked
    assert prompt == "q?" and completion == text.removeprefix("q?").removesuffix("<end>")


def test_a_closing_marker_of_one_token_stops_generation():
    engine, session = session_with(answers("a]", "<", "7]", "x]", "42\0"), min_new_tokens=3)
    workflow = Echo(open="<", close="]", output="{output}", max_calls=2)
    [t] = asyncio.run(workflow.run(session, {"prompt": "q?", "answer": "42"}))
    assert session.tokenizer.decode(t.tokens.tolist()) == "q?a]<"  # nothing to stop for: the model's own end
    engine, session = session_with(answers("a]", "b<7]", "x]", "42\0"), min_new_tokens=3)
    [t] = asyncio.run(workflow.run(session, {"prompt": "q?", "answer": "42"}))
    assert session.tokenizer.decode(t.tokens.tolist()) == "q?a]b<7]77x]42<end>"  # a marker that closes nothing
    assert t.metrics["tool_calls"] == 1
    check_against_requests_in_pieces(t, engine.requests)
    assert [r.sampling.stop_token_ids for r in engine.requests] == [(0, ord("]"))] * 4
    assert [r.sampling.min_new_tokens for r in engine.requests] == [3, 1, 0, 0]
    assert [r.sampling.max_new_tokens for r in engine.requests] == [50, 48, 44, 42]


def check_against_requests_in_pieces(trajectory, requests):
    """As `check_against_requests`, where nothing may stand between two generations."""
    for request in requests:
        np.testing.assert_array_equal(trajectory.tokens[: len(request.tokens)], request.tokens)
        assert trajectory.loss_mask[len(request.tokens)]
    outside = (trajectory.versions == -1) & (trajectory.logprobs == 0)
    np.testing.assert_array_equal(trajectory.loss_mask, ~outside)


def test_calls_and_tokens_are_limited_and_failed_calls_are_told():
    engine, session = session_with(answers("<py>loop</py>", "<py>1</py>42\0"), max_new_tokens=30)
    [t] = asyncio.run(Echo(max_calls=1, **MARKS).run(session, {"prompt": "q?", "answer": "42"}))
    text = session.tokenizer.decode(t.tokens.tolist())
    assert text == "q?<py>loop</py><out>looploop\ntimeout</out><py>1</py>42<end>"
    assert t.metrics["tool_calls"] == t.metrics["tool_errors"] == 1 and engine.requests[1].sampling.max_new_tokens == 17


@pytest.mark.parametrize("texts, settings", [
    (["<py>1</py>"], {"max_new_tokens": 10}),  # the budget is spent
    (["<py>" + "1" * 80 + "</py>"], {"max_new_tokens": 120}),  # no room for the output
])  # fmt: skip
def test_ends_behind_a_call_when_there_is_no_room_to_go_on(texts, settings):
    engine, session = session_with(answers(*texts), **settings)
    [t] = asyncio.run(Echo(**MARKS).run(session, {"prompt": "q?", "answer": "42"}))
    assert t.finish_reason == "length" and t.loss_mask[-1] and len(engine.requests) == 1
    check_against_requests(t, engine.requests)


def test_long_outputs_are_cut_but_closed():
    _, session = session_with(answers("<py>12345678</py>", "42\0"))
    [t] = asyncio.run(Echo(max_output_tokens=9, **MARKS).run(session, {"prompt": "q?", "answer": "42"}))
    assert session.tokenizer.decode(t.tokens.tolist()) == "q?<py>12345678</py><out>1234</out>42<end>"


def test_programs_run_in_the_sandbox():
    _, session = session_with(answers("<py>print(6 * 7)</py>", "<py>1 / 0</py>", "42\0"), max_new_tokens=150)
    [t] = asyncio.run(ToolUse(**MARKS).run(session, {"prompt": "q?", "answer": "42"}))
    text = session.tokenizer.decode(t.tokens.tolist())
    assert "<out>42</out>" in text and "ZeroDivisionError" in text
    assert t.metrics["tool_calls"] == 2 and t.metrics["tool_errors"] == 1


HANGS = """
import sys
from areal_jax.rewards.sandbox import run_script
run_script("import pathlib, signal; pathlib.Path('up').touch(); signal.pause()", isolation="landlock")
"""


@pytest.mark.skipif(bool(works("landlock")), reason="no Landlock")
def test_the_folder_of_a_worker_killed_while_a_program_ran_is_removed_and_no_living_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workers = []
    for _ in range(2):
        environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        workers.append(subprocess.Popen([sys.executable, "-c", HANGS], env=environment))
        while len(list(tmp_path.glob("areal-jax-sandbox-*/scratch/up"))) < len(workers):
            assert workers[-1].poll() is None
    killed, living = workers
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ToolUse()
    (left,) = tmp_path.iterdir()
    assert (left / "scratch" / "up").exists() and living.poll() is None
    living.kill()
    living.wait()
    ToolUse()
    assert not list(tmp_path.iterdir())


def test_markers_must_make_sense():
    with pytest.raises(ValueError, match="output"):
        ToolUse(output="nothing")
