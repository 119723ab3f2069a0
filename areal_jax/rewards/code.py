"""The code verifier: does the program in a completion pass the tests?

The program runs in a sandbox. What it is compared with never enters the program's process: expected outputs and results
stay in the verifier, and assertions run in a process of their own (see `assertions`).
"""

import dataclasses
import inspect
import math
import os
import re
import time
import warnings
from typing import Any, Literal

from areal_jax.rewards import exchange, sandbox
from areal_jax.rewards.code_tests import Assertions, Calls, InputOutput, read_tests, same_output, same_value
from areal_jax.rewards.outcome import VerifierError, VerifierTimeout
from areal_jax.rewards.sandbox import Child, Limits

_FENCE = re.compile(r"^([ \t]*)```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Grade:
    """How many tests passed, and the name of what went wrong first ("" if nothing)."""

    passed: int
    total: int
    reason: str


def grade_code(
    completion: str,
    tests: Any,
    *,
    entry_point: str | None = None,
    starter: str = "",
    reward: Literal["all", "fraction"] = "all",
    cpu_seconds: int = 5,
    wall_seconds: float = 20.0,
    total_seconds: float = 90.0,
    memory_bytes: int = 1 << 30,
    isolation: str = "auto",
    in_place: bool = False,
    time_limit: float = math.inf,
) -> dict[str, Any]:
    """Runs the program in `completion` against `tests` (see `read_tests` for the forms) in a sandbox.

    `starter` is code that the prompt gave (HumanEval: the prompt itself): see `extract_program`. `reward`: 1 for all
    tests and else 0, or the fraction that passed. Limits hold for each process, and in the stdin/stdout form each test
    runs in one of its own; `total_seconds`, or 0.8 of the pool's `time_limit` where that is shorter, is for all tests
    together. `in_place`: let assertions see what the program did to the lists, dicts and sets that they passed to it.

    Returns `reward`, `accuracy` (1.0 if all passed), `passed`, `tests`, and `reason`, the name of the first failure:
    wrong answers and hostile programs score 0 by name. Raises `VerifierError` if the tests cannot be read or there is
    no sandbox, `VerifierTimeout` if there are more tests than there is time for (tests that are left over because the
    program itself used up its limits are failed).
    """
    if reward not in ("all", "fraction"):
        raise VerifierError(f"grade_code: reward must be 'all' or 'fraction', found {reward!r}")
    given = read_tests(tests, entry_point)
    program = extract_program(completion, starter)
    budget = min(total_seconds, 0.8 * time_limit)
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=min(wall_seconds, budget), memory_bytes=memory_bytes)
    kind, deadline = sandbox.choose(isolation), time.monotonic() + budget
    if program is None:
        grade = Grade(0, 1, "no_program")
    elif isinstance(given, InputOutput):
        grade = _grade_pairs(program, given, limits, kind, deadline, stop_early=reward == "all")
    elif isinstance(given, Calls):
        grade = _grade_calls(program, given, limits, kind)
    else:
        if starter and given.entry_point and _compiles(starter):  # its helpers are the tests', not the program's
            given = dataclasses.replace(given, setup=f"{starter}\n{given.setup}")
        grade = _grade_assertions(program, given, limits, kind, in_place=in_place)
    passed = float(grade.passed == grade.total)
    return {
        "reward": passed if reward == "all" else grade.passed / grade.total,
        "accuracy": passed,
        "passed": grade.passed,
        "tests": grade.total,
        "reason": "" if passed else grade.reason or "wrong_answer",
    }


def verify_code(completion: str, tests: Any, **options: Any) -> float:
    """The reward of `grade_code` (which see for the options), for those who want a number only."""
    return grade_code(completion, tests, **options)["reward"]


verify_code.__signature__ = inspect.signature(grade_code)  # the pool passes what the signature names


def extract_program(completion: str, starter: str = "") -> str | None:
    """The program in a completion: the last block of Python after `</think>`; without one, the text if that is Python.

    A block that names no language counts where no other does: behind a program it usually is its output.
    With `starter`, a whole program comes after the starter, and an indented continuation is joined to it. None if there
    is no program.
    """
    text = completion.rpartition("</think>")[2]
    found = [
        (language.lower(), "".join(line.removeprefix(indent) for line in body.splitlines(True)))
        for indent, language, body in _FENCE.findall(text)
        if body.strip()
    ]
    blocks = [body for language, body in found if language in ("python", "python3", "py")]
    blocks = blocks or [body for language, body in found if not language]
    if not blocks:
        candidates = [f"{starter}{text}", f"{starter}\n{text}"] if starter else [text]
        found = next((program for program in candidates if text.strip() and _compiles(program)), None)
        return f"{starter}{text}" if starter and found is None else found
    block = blocks[-1]
    if not starter:
        return block
    if block.lstrip("\n")[0] in " \t":
        return f"{starter}{block}"
    whole = f"{starter}\n{block}"
    return whole if _compiles(whole) else block


def _compiles(program: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(program, "program.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _grade_pairs(
    program: str, given: InputOutput, limits: Limits, kind: str, deadline: float, *, stop_early: bool
) -> Grade:
    passed, reason, too_slow = 0, "", False
    budget = deadline - time.monotonic()
    for stdin, expected in given.cases:
        started = time.monotonic()
        result = _run_within(deadline, program, stdin, limits, kind)
        too_slow |= time.monotonic() - started > budget / 2
        if result is None:
            if too_slow:  # its own doing: what it has not passed by now it does not pass
                reason = reason or "timeout"
                break
            raise VerifierTimeout(
                f"the tests together took more than their time; {passed} of {len(given.cases)} passed"
            )
        if not result.reason and same_output(result.stdout, expected):
            passed += 1
            continue
        reason = reason or result.reason or "wrong_answer"
        too_slow |= result.reason in ("cpu_limit", "timeout")
        if stop_early:
            break
    return Grade(passed, len(given.cases), reason)


def _run_within(deadline: float, program: str, stdin: str, limits: Limits, kind: str) -> sandbox.RunResult | None:
    """Runs one test for its wall time or until `deadline`, whichever comes first; None if it was the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    capped = dataclasses.replace(limits, wall_seconds=min(left, limits.wall_seconds))
    try:
        result = sandbox.run_script(program, stdin, limits=capped, isolation=kind)
    except VerifierError:
        if time.monotonic() < deadline:
            raise
        return None  # there was not even the time to set up the sandbox
    return None if left < limits.wall_seconds and result.reason == "timeout" else result


def _not_plain(value: Any) -> Any:
    raise VerifierError(f"a test passes a {type(value).__name__}; only plain values can be sent to a program")


def _grade_calls(program: str, given: Calls, limits: Limits, kind: str) -> Grade:
    arguments = [exchange.encode(list(case[0]), _not_plain) for case in given.cases]
    spec = {"role": "calls", "program": program, "entry_point": given.entry_point, "calls": arguments}
    (result,) = sandbox.run_children([Child(spec, limits, kind)])
    passed, reason = 0, ""
    frames = exchange.split_frames(result.frames)
    for _, acceptable in given.cases:
        try:
            frame = next(frames)
            if not isinstance(frame, dict):
                raise exchange.PeerGone("the program sent what is not a result")
            found = exchange.decode_json(frame["ok"]) if "ok" in frame else exchange.PeerGone
        except (StopIteration, exchange.PeerGone) as error:
            reason = reason or result.reason or str(error) or "the program ended"
            break
        if found is not exchange.PeerGone and any(same_value(found, expected) for expected in acceptable):
            passed += 1
        else:
            error = frame.get("error")
            reason = reason or (error[:300] if isinstance(error, str) else "wrong_answer")
    return Grade(passed, len(given.cases), reason)


def _grade_assertions(program: str, given: Assertions, limits: Limits, kind: str, *, in_place: bool) -> Grade:
    """Two children: one holds the program, the other the assertions; two pipes join them."""
    to_program, to_tests = os.pipe(), os.pipe()
    serving = {"role": "serve", "program": program, "read_fd": to_program[0], "write_fd": to_tests[1]}
    judging = {"role": "tests", "setup": given.setup, "tests": list(given.tests), "entry_point": given.entry_point}
    judging |= {"read_fd": to_tests[0], "peer_fd": to_program[1], "in_place": in_place}
    server = Child(serving, limits, kind, pass_fds=(to_program[0], to_tests[1]))
    judge = Child(judging, limits, kind, pass_fds=(to_tests[0], to_program[1]))
    ran, judged = sandbox.run_children([server, judge])
    verdict = next(exchange.split_frames(judged.frames), None)
    if verdict is None:
        return Grade(0, len(given.tests), ran.reason or judged.reason or "no verdict")
    if "broken" in verdict:
        raise VerifierError(verdict["broken"])
    reason = verdict["reason"]
    if reason == "the program ended" and ran.reason not in ("", "stopped"):
        reason = ran.reason
    return Grade(verdict["passed"], verdict["total"], reason)
