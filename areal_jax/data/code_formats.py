"""Published data sets of programming problems: records with `prompt`, `tests`, perhaps `entry_point` and `starter`.

The tests stay in the form in which they were published; `areal_jax.rewards.verify_code` reads them.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from typing import Any

from areal_jax.data.formats import BadRecord, Record, text

STDIN = "Write a Python program that reads from standard input and writes to standard output. "
BLOCK = "Put the whole program into one ```python block.\n\n"
COMPLETE = "Complete the following Python function. " + BLOCK + "```python\n{}```\n"
STARTER = "Use this beginning:\n\n```python\n{}\n```\n\n"


def humaneval(source: Record) -> Record:
    """HumanEval: `prompt` (the head of a function), `test` with `check(candidate)`, `entry_point`."""
    head = text(source, "prompt")
    return {
        "prompt": COMPLETE.format(head if head.endswith("\n") else head + "\n"),
        "tests": text(source, "test"),
        "entry_point": text(source, "entry_point"),
        "starter": head,
        **_rest(source, "task_id", "canonical_solution"),
    }


def mbpp(source: Record) -> Record:
    """MBPP, full (`text`, `test_list`, `test_setup_code`) and sanitized (`prompt`, `test_list`, `test_imports`)."""
    tests = source.get("test_list")
    if not isinstance(tests, list) or not tests:
        raise BadRecord("its 'test_list' is not a list of assertions")
    task = text(source, "text" if "text" in source else "prompt")
    examples = "\n".join(tests)
    given = {"test_list": tests} | _rest(source, "test_setup_code", "test_imports")
    prompt = f"{task}\n{BLOCK}It must satisfy:\n\n```python\n{examples}\n```\n"
    return {"prompt": prompt, "tests": given, **_rest(source, "task_id", "code")}


def taco(source: Record) -> Record:
    """TACO and APPS: `question`, `input_output` (JSON with inputs, outputs and perhaps fn_name), `starter_code`."""
    tests = _json(source, "input_output")
    if not isinstance(tests, dict) or not tests.get("inputs"):
        raise BadRecord("its 'input_output' holds no tests")
    prompt = _ask(text(source, "question"), source.get("starter_code") or "", bool(tests.get("fn_name")))
    return {"prompt": prompt, "tests": tests, **_rest(source, "difficulty", "problem_id")}


def deepcoder(source: Record) -> Record:
    """DeepCoder: `problem`, `tests` (JSON, either form), `starter_code`, `metadata`."""
    tests = _json(source, "tests")
    if not tests:
        raise BadRecord("its 'tests' are empty")
    called = bool(_function(tests))
    prompt = _ask(text(source, "problem"), source.get("starter_code") or "", called)
    return {"prompt": prompt, "tests": tests, **_rest(source, "task_id")}


def livecodebench(source: Record) -> Record:
    """LiveCodeBench: `question_content`, public and private test cases, `starter_code`, `metadata` with func_name."""
    tests = _json(source, "public_test_cases") + _private(source.get("private_test_cases") or "[]")
    if not tests:
        raise BadRecord("it has no test cases")
    name = _json(source, "metadata").get("func_name") if source.get("metadata") else None
    starter = source.get("starter_code") or ""
    record = {"prompt": _ask(text(source, "question_content"), starter, bool(name)), "tests": tests}
    if name:
        record["entry_point"] = name
    return record | _rest(source, "question_id", "contest_date", "difficulty", "platform")


def detect_code(source: Record) -> str | None:
    """The name of the format that `source`'s fields show, if it is one of these."""
    fields = set(source)
    if {"prompt", "test", "entry_point"} <= fields:
        return "humaneval"
    if "test_list" in fields:
        return "mbpp"
    if {"question_content", "public_test_cases"} <= fields:
        return "livecodebench"
    if {"question", "input_output"} <= fields:
        return "taco"
    if {"problem", "tests"} <= fields:
        return "deepcoder"
    return None


def _ask(question: str, starter: str, called: bool) -> str:
    how = "" if called else STDIN
    beginning = STARTER.format(starter.rstrip()) if starter.strip() else ""
    return f"{question.rstrip()}\n\n{how}{BLOCK}{beginning}"


def _function(tests: Any) -> str | None:
    first = tests[0] if isinstance(tests, list) else tests
    if not isinstance(first, dict):
        return None
    metadata = first.get("metadata") or {}
    return first.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, dict) else None)


def _rest(source: Record, *keys: str) -> Record:
    return {key: source[key] for key in keys if source.get(key) is not None}


def _json(source: Record, key: str) -> Any:
    value = source.get(key)
    if not isinstance(value, str):
        if isinstance(value, (list, dict)):
            return value
        raise BadRecord(f"it has no '{key}' (its fields: {sorted(source)})")
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRecord(f"its '{key}' is not valid JSON ({error})") from None


def _private(value: Any) -> list[Any]:
    """Hidden test cases: JSON, or what LiveCodeBench makes of it: a serialised text, compressed, in base64."""
    if isinstance(value, list):
        return value
    try:
        if value.lstrip().startswith("["):
            return json.loads(value)
        return json.loads(_serialised_text(zlib.decompress(base64.b64decode(value, validate=True))))
    except (binascii.Error, zlib.error, ValueError, struct.error) as error:
        raise BadRecord(f"its 'private_test_cases' cannot be read ({error})") from None


def _serialised_text(data: bytes) -> str:
    """The text in Python's serialisation of exactly one text; anything else in it is refused, nothing is run."""
    sizes = {0x8C: "<B", 0x58: "<I", 0x8D: "<Q"}  # the three opcodes of texts, by the width of their length
    skipped = {0x80: 1, 0x95: 8, 0x94: 0, 0x71: 1, 0x72: 4}  # protocol, frame, and three of the memo
    place, found = 0, None
    while place < len(data):
        opcode = data[place]
        place += 1
        if opcode == 0x2E and found is not None and place == len(data):
            return found
        if opcode in sizes and found is None:
            form = sizes[opcode]
            (length,) = struct.unpack_from(form, data, place)
            place += struct.calcsize(form)
            found = data[place : place + length].decode("utf-8")
            place += length
        elif opcode in skipped:
            place += skipped[opcode]
        else:
            break
    raise ValueError("not one serialised text")
