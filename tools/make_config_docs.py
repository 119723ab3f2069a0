#!/usr/bin/env python3
"""Writes docs/config.md from the settings' dataclasses and their comments: python tools/make_config_docs.py [--check]

With --check it writes nothing, and exits with 1 if the file is not what it would write.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import tokenize
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from areal_jax.config import SECTIONS, RunConfig  # noqa: E402

PATH = ROOT / "docs" / "config.md"
HEAD = """# Settings

Made by `python tools/make_config_docs.py` from the dataclasses in the code; do not edit.

A config file is a Python file with `get_config()`, which changes what `areal_jax.config.default_config()` returns. On
the command line, `--config.SECTION.KEY=VALUE` changes one setting: numbers and text as they are, tuples and dicts as
in Python. A key that does not exist, a value of the wrong type and a combination that cannot work are refused before
anything starts. Each run keeps its whole configuration in `config.json` in its folder.
"""


def document() -> str:
    """The whole page."""
    parts = [HEAD, table("Top level", RunConfig, "")]
    parts += [table(f"`{name}`", cls, f"{name}.") for name, cls in SECTIONS.items()]
    return "\n".join(parts)


def table(title: str, cls: type, prefix: str) -> str:
    """One section: what its module says about it, and a row for each setting."""
    lines = [f"## {title}", ""]
    if prefix:
        lines += [(inspect.getdoc(inspect.getmodule(cls)) or "").split("\n")[0], ""]
    lines += ["| setting | default | meaning |", "|---|---|---|"]
    meanings = comments(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{prefix}{field.name}` | `{default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line, and any that follow it on lines of their own."""
    source = inspect.getsource(cls)
    at = {node.target.id: node.end_lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)}
    field_of_line = {line: name for name, line in at.items()}
    found: dict[str, str] = {}
    current = ""
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[: token.start[1]].strip()
            current = current if own_line else field_of_line.get(token.start[0], "")
            if current:
                found[current] = f"{found.get(current, '')} {token.string.lstrip('# ')}".strip()
        elif token.type == tokenize.NAME:
            current = field_of_line.get(token.start[0], "") or current
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = document()
    if check:
        return int(not PATH.exists() or PATH.read_text(encoding="utf-8") != page)
    PATH.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
