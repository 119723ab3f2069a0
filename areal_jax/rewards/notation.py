"""Notation that math-verify does not read: rewritten into what it reads, and compared as text where it reads nothing.

Every rule is a regular expression that takes time linear in the text, since the text is a model's.
"""

import re
from fractions import Fraction

_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[€£~]|\\\$", " "),
        (r"[°˚]", r"^{\\circ}"),
        (r"√\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\^\s*(?:\{\s*)?\\(?:text|mathrm|textrm)\s*\{(?:st|nd|rd|th)\}(?:\s*\})?", ""),  # 7^{\text{th}}
        (r"\\text(?:bf|rm)?\{(\s*[-+]?\d[^{}]*)\}", r"\1"),  # \text{7 apples}
        (r"(?<=\d)\\[,!](?=\d{3}(?!\d))", ""),  # 5\,000
    )
]
_FRACTIONS = dict(zip("½⅓⅔¼¾⅕⅛", ("1/2", "1/3", "2/3", "1/4", "3/4", "1/5", "1/8")))
_FRACTION = re.compile(f"[{''.join(_FRACTIONS)}]")
_SPACED_THOUSANDS = re.compile(r"\s*[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,40})\.(\d{0,40})\\overline\s*\{\s*(\d{1,40})\s*\}")
_LABEL = re.compile(r"\A\s*\$?\s*\\(?:text|textbf|mathrm|mathbf|bf)\s*\{\s*\(?([A-J])\)?[.:]?\s*\}(?=.*\w)", re.DOTALL)
_WRAPPERS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_INVISIBLE = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:left|right)\b|\\displaystyle\b|[~$]")
_BASE = re.compile(r"_\s*\{?\s*(\d{1,3})\s*\}?[\s$]*\Z")
_SPACE = re.compile(r"\s+")
_NEEDLESS_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def readable(text: str) -> str:
    """`text` with degree signs, thin spaces between thousands, ordinals, repeating decimals, ... in plain LaTeX."""
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    text = _FRACTION.sub(lambda match: rf"\frac{{{_FRACTIONS[match[0]][0]}}}{{{_FRACTIONS[match[0]][2]}}}", text)
    text = _REPEATING.sub(_as_fraction, text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def unlabelled(text: str) -> str:
    r"""`text` without the label of a choice before the answer itself: "\textbf{(C)}\ 12" -> "\ 12"."""
    return _LABEL.sub("", text, count=1)


def same_text(a: str, b: str) -> bool:
    """Whether two answers are written alike, but for spaces and fonts."""
    return _bare(a) == _bare(b) != ""


def in_other_bases(a: str, b: str) -> bool:
    """Whether both are numbers with a base below them, and not the same: 12_8 and 12_{10}."""
    bases = [_BASE.search(text) for text in (a, b)]
    return all(bases) and len({int(base[1]) for base in bases}) > 1


def _bare(text: str) -> str:
    text = _INVISIBLE.sub(" ", _WRAPPERS.sub(r"\1", text))
    return _NEEDLESS_SPACE.sub("", _SPACE.sub(" ", text).strip()).rstrip(".")


def _as_fraction(match: re.Match) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    value = Fraction(int(whole + fixed)) + Fraction(int(repeated), 10 ** len(repeated) - 1)
    value /= 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
