"""A reward model behind an HTTP endpoint, as one more verifier.

Plain POST of JSON, answered with JSON; which fields are sent and where the number is in the answer are arguments, so
that the usual servers (vLLM's /classify and /pooling, one's own) need no adapter.
"""

import asyncio
import json
import math
import os
import time
import urllib.error
import urllib.request
from typing import Any

from areal_jax.rewards.outcome import VerifierError, VerifierTimeout

_AGAIN = (429, 500, 502, 503, 504)
MAX_REPLY = 1 << 20


async def reward_model(
    prompt: str,
    completion: str,
    *,
    url: str,
    body: dict[str, Any] | None = None,
    number: str = "reward",
    token_variable: str = "",
    timeout: float = 10.0,
    retries: int = 2,
    pause: float = 0.5,
) -> float:
    """The number that the reward model at `url` gives to a completion.

    Args:
      body: what to POST; "{prompt}" and "{completion}" inside its strings are replaced. Default: both, by these names.
      number: where the reward is in the JSON answer, keys and indices joined by dots: "reward", "data.0.probs.1".
      token_variable: environment variable with a bearer token (a secret does not belong into a config).
      timeout: seconds for all attempts together.
      retries: further attempts when the server cannot be reached or answers 429 or 5xx.
      pause: seconds before the first further attempt; doubled for each.

    Raises `VerifierTimeout`, or `VerifierError` naming the URL and what it answered.
    """
    template = body if body is not None else {"prompt": "{prompt}", "completion": "{completion}"}
    data = json.dumps(_fill(template, {"{prompt}": prompt, "{completion}": completion})).encode()
    headers = {"Content-Type": "application/json"}
    if token_variable:
        headers["Authorization"] = f"Bearer {os.environ.get(token_variable, '')}"
    deadline = time.monotonic() + timeout
    for attempt in range(retries + 1):
        remaining = deadline - time.monotonic()
        try:
            text = await asyncio.wait_for(asyncio.to_thread(_post, url, data, headers, remaining), remaining)
            return _find(text, number, url)
        except TimeoutError:
            raise VerifierTimeout(f"the reward model at {url} did not answer within {timeout:g} s") from None
        except urllib.error.HTTPError as error:
            problem, final = (
                f"answered {error.code}: {error.read(300).decode(errors='replace')}",
                error.code not in _AGAIN,
            )
        except (urllib.error.URLError, OSError) as error:
            problem, final = f"cannot be reached: {getattr(error, 'reason', error)}", False
        wait = pause * 2**attempt
        if final or attempt == retries or time.monotonic() + wait >= deadline:
            break
        await asyncio.sleep(wait)
    raise VerifierError(f"the reward model at {url} {problem}")


def _post(url: str, data: bytes, headers: dict[str, str], timeout: float) -> bytes:
    request = urllib.request.Request(url, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=max(timeout, 0.001)) as reply:
            return reply.read(MAX_REPLY)
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        raise


def _fill(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fill(item, words) for item in value]
    if not isinstance(value, str):
        return value
    head, found, tail = min(
        (value.partition(word) for word in words), key=lambda parts: len(parts[0])
    )  # replaced left to right, so that a completion that contains "{prompt}" stays as it is
    return head + words[found] + _fill(tail, words) if found else value


def _find(text: bytes, number: str, url: str) -> float:
    try:
        value = json.loads(text)
        for key in number.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        shown = text[:200].decode(errors="replace")
        raise VerifierError(f"the reward model at {url} sent no number at {number!r}: {shown}") from None
    return float(value)
