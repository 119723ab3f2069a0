"""What is in the boxes of a LaTeX text: one reader for gold solutions and for a model's answers."""

import re

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[\[\]()]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)*")


def boxed(text: str) -> str | None:
    """What is inside the last outermost `\\boxed{...}` (balanced braces), in time linear in the text.

    Boxes joined by "and", "or" or commas count as one list; a box that is never closed does not count. `\\fbox{...}`
    and `\\boxed 5` count where there is no other box.
    """
    boxes = _boxes(text)
    boxes = [box for box in boxes if text.startswith("\\boxed", box[0])] or boxes
    if not boxes:
        bare = None
        for bare in _BARE_BOX.finditer(text):  # noqa: B007  (the last one is what we want)
            pass
        return bare[1] if bare else None
    joined = [boxes.pop()]
    while boxes and joined[0][0] - boxes[-1][2] < 40 and _BETWEEN_BOXES.fullmatch(text, boxes[-1][2] + 1, joined[0][0]):
        joined.insert(0, boxes.pop())
    return ", ".join(dict.fromkeys(text[content:end] for _, content, end in joined))


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """The outermost closed boxes: start of the command, start of the content, end of the content."""
    boxes: list[tuple[int, int, int]] = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text):
        if token[0].endswith("{") and token[0] != "\\{":
            open_braces.append((token.start(), token.end()) if len(token[0]) > 1 else None)
        elif token[0] == "}" and open_braces and (start := open_braces.pop()) is not None:
            while boxes and boxes[-1][0] > start[0]:  # those lie inside this one
                boxes.pop()
            boxes.append((*start, token.start()))
    return boxes
