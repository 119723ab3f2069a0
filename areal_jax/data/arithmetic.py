"""Generated arithmetic problems, a data set by its spec: "arithmetic:count=4096,seed=0,min_terms=2,max_terms=8".

The problems are chains of additions ("3+5+9?"), whose worked answers show each running sum ("3+5=8;8+9=17####17"): the
number of terms sets the length of the answer. Problem i depends only on the settings and i. An eighth of all problems,
told by a checksum of their text, is held out: short sums come again and again, so another seed holds nothing out.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

PREFIX = "arithmetic:"
HELD_OUT = 8  # one problem in so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What "arithmetic:key=value,..." means; each problem has min_terms to max_terms numbers below `10 ** digits`.

    How many is the least of `tail` uniform draws: every length as often with 1, a long tail of rare lengths with more.
    `held_out` 0: none of the held-out problems; 1: these alone; -1: any.
    """

    count: int = 4096
    seed: int = 0
    min_terms: int = 2
    max_terms: int = 8
    tail: int = 1
    digits: int = 1
    held_out: int = -1

    def __post_init__(self):
        if min(self.count, self.tail, self.digits) < 1 or not 2 <= self.min_terms <= self.max_terms:
            raise ValueError(f"count, tail, digits must be at least 1, and 2 <= min_terms <= max_terms, found {self}")
        if self.held_out not in (-1, 0, 1):
            raise ValueError(f"held_out must be 0 (none of them), 1 (these alone) or -1 (any), found {self.held_out}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record of problem `index`: prompt, answer, and the worked `solution` that ends in the answer."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng([self.seed, index])
        while True:
            length = int(random.integers(self.min_terms, self.max_terms + 1, self.tail).min())
            terms = [int(term) for term in random.integers(0, 10**self.digits, length)]
            prompt = "+".join(map(str, terms)) + "?"
            if self.held_out in (-1, is_held_out(prompt)):
                solution = worked(itertools.accumulate(terms), terms)
                return {"prompt": prompt, "answer": str(sum(terms)), "solution": solution}


def is_held_out(prompt: str) -> bool:
    """Whether a problem is one of those held out."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def parse_spec(spec: str) -> Arithmetic:
    """The generator that `spec` describes; raises ValueError naming the part that cannot be used."""
    fields = {field.name for field in dataclasses.fields(Arithmetic)}
    settings: dict[str, int] = {}
    for part in filter(None, spec.removeprefix(PREFIX).split(",")):
        key, equals, value = part.partition("=")
        if key not in fields or not equals or not value.lstrip("-").isdigit():
            raise ValueError(f"'{part}' in '{spec}': expected key=whole number with a key of {sorted(fields)}")
        settings[key] = int(value)
    return Arithmetic(**settings)


def terms_of(prompt: str) -> list[int]:
    """The terms that a prompt of this generator asks to add."""
    return [int(term) for term in prompt.removesuffix("?").split("+")]


def worked(totals: Iterable[int], terms: Sequence[int]) -> str:
    """The worked solution with these running sums (the first is the first term, the last the answer)."""
    totals = list(totals)
    steps = (f"{before}+{term}={after}" for before, term, after in zip(totals, terms[1:], totals[1:]))
    return ";".join(steps) + f"####{totals[-1]}"
