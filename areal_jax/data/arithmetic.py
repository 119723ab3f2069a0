"""Generated arithmetic problems, a data set by its spec: "arithmetic:count=4096,seed=0,min_terms=2,max_terms=8".

The problems are chains of additions ("3+5+9?"), whose worked answers show each running sum ("3+5=8;8+9=17####17"): the
number of terms sets the length of the answer. Problem i depends only on the settings and i.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

PREFIX = "arithmetic:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What "arithmetic:key=value,..." means; each problem has min_terms to max_terms numbers below `10 ** digits`.

    How many is the least of `tail` uniform draws: every length as often with 1, a long tail of rare lengths with more.
    """

    count: int = 4096
    seed: int = 0
    min_terms: int = 2
    max_terms: int = 8
    tail: int = 1
    digits: int = 1

    def __post_init__(self):
        if min(self.count, self.tail, self.digits) < 1 or not 2 <= self.min_terms <= self.max_terms:
            raise ValueError(f"count, tail, digits must be at least 1, and 2 <= min_terms <= max_terms, found {self}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record of problem `index`: prompt, answer, and the worked `solution` that ends in the answer."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng([self.seed, index])
        length = int(random.integers(self.min_terms, self.max_terms + 1, self.tail).min())
        terms = [int(term) for term in random.integers(0, 10**self.digits, length)]
        return {
            "prompt": "+".join(map(str, terms)) + "?",
            "answer": str(sum(terms)),
            "solution": worked(itertools.accumulate(terms), terms),
        }


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
