"""The three usual forms of tests for programs, read from the shapes in which data sets publish them; and comparison.

Assertions (HumanEval, MBPP, pytest-like functions), stdin/stdout pairs and calls with JSON arguments (LiveCodeBench,
TACO, APPS, DeepCoder). Nothing here runs a program.
"""

import dataclasses
import json
import math
from typing import Any

from areal_jax.rewards.outcome import VerifierError


@dataclasses.dataclass(frozen=True)
class Assertions:
    """Python sources, each of which must run without an error; `setup` runs before them."""

    tests: tuple[str, ...]
    setup: str = ""
    entry_point: str | None = None  # HumanEval: `check(candidate)` is called with this function


@dataclasses.dataclass(frozen=True)
class InputOutput:
    """(stdin, expected stdout) pairs for a script."""

    cases: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Calls:
    """(arguments, acceptable results) for one function, or method of a class `Solution`."""

    entry_point: str
    cases: tuple[tuple[list[Any], list[Any]], ...]


Tests = Assertions | InputOutput | Calls


def read_tests(tests: Any, entry_point: str | None = None) -> Tests:
    """The tests that `tests` describes. Raises `VerifierError` saying what was expected.

    Accepts: Python source with assertions or with `check(candidate)`; a list of assertion sources; a dict with `test`
    or `test_list` (and `test_setup_code`, `entry_point`); a dict with `inputs`, `outputs` and perhaps `fn_name`; a list
    of dicts with `input`, `output` and perhaps `testtype` or `type`, `fn_name`, `metadata`; or any of it as JSON.
    """
    if isinstance(tests, str):
        try:
            decoded = json.loads(tests)
        except ValueError:
            decoded = None
        if not isinstance(decoded, list | dict):
            return _assertions((tests,), "", entry_point)
        tests = decoded
    if isinstance(tests, dict):
        entry_point = tests.get("fn_name") or tests.get("entry_point") or entry_point
        setup = "\n".join([*tests.get("test_imports", ()), tests.get("test_setup_code") or tests.get("setup") or ""])
        if "test" in tests:
            return _assertions((tests["test"],), setup, entry_point)
        if "test_list" in tests or "asserts" in tests:
            return _assertions(tuple(tests.get("test_list") or tests["asserts"]), setup, entry_point)
        if "inputs" in tests and "outputs" in tests:
            if len(tests["inputs"]) != len(tests["outputs"]):
                raise VerifierError(f"tests: {len(tests['inputs'])} inputs but {len(tests['outputs'])} outputs")
            pairs = list(zip(tests["inputs"], tests["outputs"]))
            return _pairs(pairs, tests.get("fn_name"), unwrap=True)
        raise VerifierError(f"tests: expected test, test_list, or inputs and outputs; found {sorted(tests)}")
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return _assertions(tuple(tests), "", entry_point)
    if isinstance(tests, list) and tests and all(isinstance(test, dict) and "input" in test for test in tests):
        first = tests[0]
        kind = str(first.get("testtype") or first.get("type") or "")
        metadata = first.get("metadata") or {}
        name = first.get("fn_name") or metadata.get("func_name") or metadata.get("fn_name")
        if name is None and kind in ("functional", "function_call"):
            name = entry_point
        if name is None and kind in ("functional", "function_call"):
            raise VerifierError("tests of calls need a function: fn_name in a test, or the record's entry_point")
        return _pairs([(test["input"], test["output"]) for test in tests], name, unwrap=False)
    raise VerifierError(f"tests: expected source, assertions, or input/output pairs; found {tests!r:.120}")


def _assertions(sources: tuple[str, ...], setup: str, entry_point: str | None) -> Assertions:
    if not any(source.strip() for source in sources):
        raise VerifierError("tests: there are none")
    return Assertions(sources, setup, entry_point)


def _pairs(pairs: list[tuple[Any, Any]], name: str | None, *, unwrap: bool) -> Tests:
    if not pairs:
        raise VerifierError("tests: there are none")
    if not name:
        return InputOutput(tuple((_text(given), _text(expected)) for given, expected in pairs))
    cases = []
    for given, expected in pairs:
        try:
            arguments = [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else given
            result = json.loads(expected) if isinstance(expected, str) and not unwrap else expected
        except ValueError as error:
            raise VerifierError(f"tests of {name}: arguments and results must be JSON: {error}") from error
        acceptable = [result]
        if unwrap and isinstance(result, list) and len(result) == 1:  # APPS and TACO wrap results in a list, sometimes
            acceptable.append(result[0])
        cases.append((arguments if isinstance(arguments, list) else [arguments], acceptable))
    return Calls(name, tuple(cases))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    return value if isinstance(value, str) else str(value)


def same_output(found: str, expected: str) -> bool:
    """Whether two outputs agree: line by line, ignoring blanks at line ends and at the end; numbers to 1e-6."""
    a, b = ([line.split() for line in text.strip().splitlines()] for text in (found, expected))
    if a == b:
        return True
    return len(a) == len(b) and all(len(x) == len(y) and all(map(_same_token, x, y)) for x, y in zip(a, b))


def _same_token(found: str, expected: str) -> bool:
    if found == expected:
        return True
    if not any(mark in expected for mark in ".eE"):  # only where a decimal number is expected
        return False
    try:
        a, b = float(found), float(expected)
    except ValueError:
        return False
    return math.isfinite(b) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


def same_value(found: Any, expected: Any) -> bool:
    """Whether a function's result agrees with the expected JSON value; tuples count as lists, floats to 1e-6."""
    try:
        return _same_value(found, expected)
    except (OverflowError, ValueError, RecursionError):  # an int that no float holds, or with too many digits for a key
        return False


def _same_value(found: Any, expected: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        by_name = {str(key): value for key, value in found.items()}
        return by_name.keys() == expected.keys() and all(_same_value(by_name[key], expected[key]) for key in expected)
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, float | int) and isinstance(expected, float | int):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
    return type(found) is type(expected) and found == expected
