"""The mathematics verifier: is the answer in a completion mathematically equal to the gold answer?

Plain numbers are compared exactly, right here. Everything else goes to math-verify (LaTeX, fractions, sets, intervals,
units, equations), whose symbolic algebra can run for ever inside one C call, where no signal reaches it. So that part
runs in a process that is killed at the time limit: the pool's worker if we are in one, else a helper of our own.
"""

import contextlib
import functools
import logging
import math
import numbers
import os
import re
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

from areal_jax.data.boxed import boxed
from areal_jax.rewards.notation import in_other_bases, readable, same_text, unlabelled
from areal_jax.rewards.outcome import Failure, Outcome, VerifierError, VerifierTimeout
from areal_jax.rewards.process import WorkerProcess
from areal_jax.rewards.worker import INSIDE_WORKER

Mode = Literal["auto", "last_number", "boxed"]
MODES: tuple[Mode, ...] = ("auto", "last_number", "boxed")

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+"
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.])(?:{_NUMBER})|(?<=[A-Za-z$€£=(])(?:{_NUMBER})")
_PLAIN_NUMBER = re.compile(rf"\s*\$?\s*(-?)\s*\\?\$?\s*({_NUMBER})(?:[eE]([-+]?\d{{1,3}}))?\s*\.?\s*\$?\s*")
_CHOICE = re.compile(r"\(?([A-J])\)?\.?")


def verify_math(
    completion: str,
    answer: str | int | float,
    *,
    mode: Mode = "auto",
    timeout: float = 5.0,
    on_timeout: Literal["raise", "zero"] = "raise",
    precision: int = 6,
    tail: int = 4000,
    time_limit: float = math.inf,
) -> float:
    """1.0 if the completion's answer equals `answer`, else 0.0.

    Only what follows the last `</think>` counts. `mode`: `boxed` looks into the last `\\boxed{...}` only; `last_number`
    takes the last number after the last `####`, or of the text (GSM8K); `auto` takes the last box, else what follows
    the last `####`, else the last expression that math-verify finds in the final `tail` characters. `answer` is the
    bare answer, or a solution with a box or `####`. `precision` is the number of decimals to which floats are compared.

    A completion without a readable answer scores 0. Safe in any thread; `timeout` (seconds) really interrupts, and so
    does 0.8 of the pool's `time_limit` where that is shorter.
    Raises `VerifierTimeout` when the comparison takes longer (0.0 with `on_timeout="zero"`), `VerifierError` when the
    gold answer cannot be read or `mode` is unknown.
    """
    gold = gold_answer(answer, mode)
    text = completion.rpartition("</think>")[2]
    if mode == "last_number":
        found = last_number(text)
        return float(found is not None and found == plain_number(gold))

    candidate = boxed(text)
    if candidate is None and mode == "boxed":
        return 0.0
    if candidate is None and "####" in text:
        candidate = text.rpartition("####")[2].strip().partition("\n")[0].strip("* ")
    if candidate is not None:
        if not candidate.strip():
            return 0.0
        expected, found = plain_number(gold), plain_number(candidate)
        if expected is not None and found is not None:
            if expected == found:
                return 1.0
            if expected.denominator == found.denominator == 1:
                return 0.0
    arguments = {
        "candidate": candidate if candidate is not None else text[-tail:],
        "exact": candidate is not None,
        "gold": gold,
        "precision": precision,
    }
    try:
        return float(_interruptible(arguments, min(timeout, 0.8 * time_limit)))
    except VerifierTimeout:
        if on_timeout == "zero":
            return 0.0
        raise


def plain_number(text: str) -> Fraction | None:
    """The exact value of `text` if it is one plain number ("1,234", "$18", "-0.5"), else None."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match is None or len(text) > 400:
        return None
    value = Fraction(match[2].replace(",", "")) * Fraction(10) ** int(match[3] or 0)
    return -value if match[1] else value


def last_number(text: str) -> Fraction | None:
    """The last number after the last `####`, or of the whole text; thousands separators are understood."""
    text = text.rpartition("####")[2]
    match = None
    for match in _NUMBER_IN_TEXT.finditer(text):  # noqa: B007  (the last one is what we want)
        pass
    if match is None or len(match[0]) > 400:
        return None
    number, before = match[0], text[: match.start()]
    if before.endswith(("-$", "-€", "-£")):
        number = "-" + number
    elif number[0] in "+-" and re.search(r"[\w)]$", before):  # "10-4": a minus between operands
        number = number[1:]
    return Fraction(number.replace(",", ""))


def gold_answer(answer: Any, mode: Mode = "auto", **_: Any) -> str:
    """The bare gold answer in `answer`: text or a number, perhaps a whole solution.

    Raises `VerifierError` where there is none: null, a truth value, a list, an object, an empty text, and in mode
    `last_number` whatever is no number. Such a record would be scored 0 for ever.
    """
    if mode not in MODES:
        raise VerifierError(f"verify_math: mode must be one of {', '.join(MODES)}, found {mode!r}")
    number = isinstance(answer, numbers.Real) and not isinstance(answer, bool)
    number = number and (isinstance(answer, numbers.Rational) or math.isfinite(answer))
    gold = _gold_text(str(answer)) if number or isinstance(answer, str) else ""
    if not gold:
        hint = " (one of a list: data.fields={'answer': 'answer.0'})" if isinstance(answer, list) else ""
        raise VerifierError(
            f"verify_math: the gold answer must be text or a finite number{hint}, found {answer!r:.200}"
        )
    if mode == "last_number" and plain_number(gold) is None:
        raise VerifierError(f"verify_math: mode 'last_number' needs a number as gold answer, found {answer!r:.200}")
    return gold


def _gold_text(answer: str) -> str:
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    inside = boxed(answer)
    return answer.strip() if inside is None else inside.strip()


class _Interrupt(BaseException):
    """Not an Exception: sympy and math-verify catch those and go on."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupts Python code (not one long C call) in the main thread after `seconds`, and every 0.2 s from then on."""

    def ring(*_: Any) -> None:
        raise _Interrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
        yield
    except _Interrupt:
        raise VerifierTimeout(f"math-verify took more than {seconds:g} s") from None
    except MemoryError:
        raise VerifierTimeout("math-verify took more memory than its process may have") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interruptible(arguments: dict[str, Any], timeout: float) -> bool:
    if INSIDE_WORKER in os.environ and threading.current_thread() is threading.main_thread():
        _library()  # an import that is interrupted halfway would spoil every later answer
        with _alarm(timeout):
            return equal(**arguments)
    outcome = _helper_call(arguments, timeout)
    if isinstance(outcome, Failure):
        raise (VerifierTimeout if outcome.kind == "timeout" else VerifierError)(outcome.text)
    return bool(outcome.reward)


_helper_lock = threading.Lock()
_helper: WorkerProcess | None = None


def _helper_call(arguments: dict[str, Any], timeout: float) -> Outcome:
    """Runs `equal` in this process's one helper, which is started on the first call and again after it was killed."""
    global _helper
    with _helper_lock:
        if _helper is None or not _helper.alive:
            _helper = WorkerProcess(memory_bytes=4 << 30)
        return _helper.call("areal_jax.rewards.mathematics.equal", arguments, timeout)


@functools.cache
def _library() -> Any:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off: ours is on
    return math_verify


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> list[Any]:
    if _CHOICE.fullmatch(gold):
        return [gold]
    gold = readable(gold)
    return _parse(f"\\boxed{{{gold}}}", exact=True) or _parse(gold, exact=False)


def _parse(text: str, *, exact: bool) -> list[Any]:
    library = _library()
    latex = library.LatexExtractionConfig(boxed_match_priority=0)
    expression = library.ExprExtractionConfig()
    return library.parse(text, [latex] if exact else [latex, expression], parsing_timeout=None)


def equal(candidate: str, gold: str, *, exact: bool, precision: int) -> bool:
    """Whether math-verify finds `candidate` equal to `gold`, without any time limit: see `verify_math` for one.

    `exact`: `candidate` is the answer and nothing else; otherwise it is looked for in the text.
    """
    expected = _parsed_gold(gold)
    if not expected:
        raise VerifierError(f"the gold answer cannot be read as mathematics: {gold!r:.200}")
    choice = _CHOICE.fullmatch(gold)
    if choice:
        return _choice(candidate, exact=exact) == choice[1]
    if exact and same_text(candidate, gold):
        return True
    if exact and in_other_bases(candidate, gold):
        return False
    shown = f"\\boxed{{{readable(unlabelled(candidate))}}}" if exact else readable(candidate)
    found = _parse(shown, exact=exact)
    if not found or _rounded_away(expected[0], found[0], precision):
        return False
    verify = functools.partial(_library().verify, float_rounding=precision, allow_set_relation_comp=True)
    return bool(verify(expected, found, timeout_seconds=None))


def _rounded_away(a: Any, b: Any, precision: int) -> bool:
    """Whether two numbers differ in their leading digits, though perhaps not in their first `precision` decimals."""
    if not all(getattr(x, "is_Float", False) or getattr(x, "is_Rational", False) for x in (a, b)):
        return False
    return bool(abs(a - b) > max(abs(a), abs(b)) / 10 ** (precision - 1))


def _choice(text: str, *, exact: bool) -> str | None:
    """The letter of a multiple-choice answer: the whole candidate, or the last capital letter that stands alone."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{\s*([^{}]*)\}", r"\1", text)
    if exact:
        match = re.fullmatch(r"[\s$]*\(?([A-J])\)?(?:(?:[\s.:$]|\\[ ,;q]).*)?", text, re.DOTALL)
        return match[1] if match else None
    found = re.findall(r"(?<![\w'])\(?([A-J])\)?(?![\w'])", text)
    return found[-1] if found else None


equal.warm_up = _library  # type: ignore[attr-defined]
verify_math.warm_up = _library  # type: ignore[attr-defined]
verify_math.check_record = gold_answer  # type: ignore[attr-defined]
