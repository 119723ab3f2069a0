"""Terms that shape the trained reward without saying whether an answer is right: length and format."""

import re

from areal_jax.rewards.outcome import VerifierError


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """DAPO's soft penalty for long answers (arXiv 2503.14476, Eq. 13), from 0 to -1; lengths in tokens.

    0 up to `max_length - buffer`, then linear down to -1 at `max_length`, and -1 beyond. A `max_length` of 0 is none.
    """
    if max_length <= 0:
        return 0.0
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong_penalty: buffer must be between 1 and max_length={max_length}, found {buffer}")
    return -min(1.0, max(0.0, (length - (max_length - buffer)) / buffer))


def format_penalty(completion: str, *, pattern: str = r"^(?!.*</think>.*</think>).*</think>.*\S") -> float:
    """0.0 if the regular expression `pattern` is found in the completion, else -1.0; for use as a verifier.

    A dot matches newlines. The default wants exactly one `</think>` and an answer after it. Raises `VerifierError` for
    a pattern that is none.
    """
    try:
        return 0.0 if re.search(pattern, completion, re.DOTALL) else -1.0
    except re.error as error:
        raise VerifierError(f"format_penalty: {pattern!r} is not a regular expression: {error}") from error
