"""What published data sets call their fields, turned into one kind of record.

A record has "prompt" (text) or "messages" (chat turns), "answer" where there is one, "tests" for programs, and keeps
what else its source says. Each format is one function from the source's record to ours; it raises `BadRecord`.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from areal_jax.data.boxed import boxed

Record = dict[str, Any]


class BadRecord(ValueError):
    """A record lacks a field, or holds something that cannot be used; the message says which."""


def gsm8k(source: Record) -> Record:
    """GSM8K: `question`, and a worked `answer` that ends in "#### number"."""
    question, solution = text(source, "question"), text(source, "answer")
    _, marker, final = solution.rpartition("####")
    if not marker or not final.strip():
        raise BadRecord("its 'answer' does not end in '#### number'")
    return {"prompt": question, "answer": final.strip().replace(",", ""), "solution": solution}


def prompt_answer(source: Record) -> Record:
    """Plain records: `prompt` (text, or chat turns) or `messages`, and usually `answer`; other fields are kept."""
    if isinstance(source.get("prompt"), list):
        source = {key: value for key, value in source.items() if key != "prompt"} | {"messages": source["prompt"]}
    if "messages" in source:
        turns = source["messages"]
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            raise BadRecord("its 'messages' is not a list of {'role': ..., 'content': ...}")
    else:
        text(source, "prompt")
    return source | ({"answer": number_as_text(source["answer"])} if "answer" in source else {})


def math(source: Record) -> Record:
    """MATH, DeepScaleR and their kind: `problem`, and `answer` or a `solution` whose last boxes are the answer."""
    problem = text(source, "problem")
    answer = source.get("answer")
    if answer is None:
        answer = (boxed(text(source, "solution")) or "").strip()
        if not answer:
            raise BadRecord("it has no 'answer', and its 'solution' has no \\boxed{}")
    rest = {key: value for key, value in source.items() if key not in ("problem", "answer", "prompt")}
    return {"prompt": problem, "answer": number_as_text(answer), **rest}


def formats() -> dict[str, Callable[[Record], Record]]:
    """Every format by name."""
    from areal_jax.data import code_formats as code

    programs = (code.humaneval, code.mbpp, code.taco, code.deepcoder, code.livecodebench)
    return {function.__name__: function for function in (gsm8k, math, prompt_answer, *programs)}


def detect(source: Record) -> str:
    """The name of the format that `source`'s fields show; raises `BadRecord` when none fits."""
    from areal_jax.data.code_formats import detect_code

    if (name := detect_code(source)) is not None:
        return name
    if "problem" in source and ("solution" in source or "answer" in source):
        return "math"
    if "question" in source and "####" in str(source.get("answer", "")):
        return "gsm8k"
    if "prompt" in source or "messages" in source:
        return "prompt_answer"
    raise BadRecord(
        f"its fields {sorted(source)} fit no known format; expected 'prompt' or 'messages' (with 'answer'), GSM8K's "
        f"'question' and 'answer', MATH's 'problem' and 'solution', or those of a data set of programs"
    )


def text(source: Record, key: str) -> str:
    """`source[key]`, which must be text that is not empty."""
    if key not in source:
        raise BadRecord(f"it has no '{key}' (its fields: {sorted(source)})")
    if not isinstance(source[key], str) or not source[key].strip():
        raise BadRecord(f"its '{key}' is not text: {source[key]!r:.60}")
    return source[key]


def number_as_text(value: Any) -> Any:
    """A finite number as text; anything else as it is: whether that can be an answer, its verifier knows."""
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    return str(value) if number and abs(value) < float("inf") else value


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
