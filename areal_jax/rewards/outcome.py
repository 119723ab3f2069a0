"""What a verifier's call came to: a `Score`, or a `Failure` with a name.

The two are never mixed: an infrastructure failure has no reward, not even 0.
"""

import math
import numbers
from typing import Any, Literal

import msgspec

FailureKind = Literal["timeout", "crash", "exception", "bad_return"]
FAILURE_KINDS: tuple[FailureKind, ...] = ("timeout", "crash", "exception", "bad_return")


class VerifierError(Exception):
    """A verifier could not judge: raised by verifiers of this package, and the base of this package's errors."""


class VerifierTimeout(VerifierError):
    """A verifier stopped itself at its own time or memory limit; becomes the failure `timeout`."""


class BadReturn(VerifierError):
    """A verifier returned something that is not a score."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One judged completion.

    `reward` is what the trainer sees (after weights, scaling and shaping), `accuracy` what is reported (never shaped),
    `values` the other named numbers, `reason` why the score is what it is, where a verifier says so ("" otherwise).
    """

    reward: float
    accuracy: float
    values: dict[str, float] = {}
    reason: str = ""
    seconds: float = 0.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A completion that could not be judged, and why.

    `timeout`: over its limit, killed; `crash`: the worker process died; `exception`: the verifier raised;
    `bad_return`: it returned something that is not a finite number or a dict of them.
    """

    kind: FailureKind
    text: str
    seconds: float = 0.0


Outcome = Score | Failure


def plain_text(text: str, size: int) -> str:
    """The beginning of `text` without what no message can carry (half surrogates, which a program may print)."""
    return text[:size].encode("utf-8", "replace").decode("utf-8")


def _number(name: str, value: Any) -> float:
    if isinstance(value, numbers.Real) or (hasattr(value, "item") and getattr(value, "size", 0) == 1):
        number = float(value)
        if math.isfinite(number):
            return number
    raise BadReturn(f"{name} must be a finite number, found {value!r:.200}")


def as_score(value: Any, *, seconds: float = 0.0) -> Score:
    """The `Score` that a verifier's return value means.

    Accepts a number, or a dict with `reward`, optionally `accuracy` (default: the reward), `reason` (a string) and any
    other named numbers. Raises `BadReturn` for everything else, NaN and infinities included.
    """
    if not isinstance(value, dict):
        reward = _number("a verifier's return value", value)
        return Score(reward=reward, accuracy=reward, seconds=seconds)
    if "reward" not in value:
        raise BadReturn(f"a verifier's dict needs the key 'reward', found {sorted(map(str, value))}")
    if not all(isinstance(name, str) for name in value):
        raise BadReturn("the keys of a verifier's dict must be strings")
    named = {name: _number(repr(name), number) for name, number in value.items() if name != "reason"}
    reward = named.pop("reward")
    reason = value.get("reason", "")
    if not isinstance(reason, str):
        raise BadReturn(f"'reason' must be a string, found {reason!r:.200}")
    return Score(
        reward=reward,
        accuracy=named.pop("accuracy", reward),
        values=named,
        reason=plain_text(reason, 500),
        seconds=seconds,
    )
