"""Wrong programs made of right ones: HumanEval's solutions with one mistake each; for the benchmark and the tests."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from typing import Any

OPPOSITE = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


class _Mutation(ast.NodeTransformer):
    """Changes the first number (one more) or the first comparison (the opposite)."""

    def __init__(self, kind: str):
        self.kind, self.done = kind, False

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if self.kind == "constant" and not self.done and type(node.value) in (int, float):
            self.done = True
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if self.kind == "comparison" and not self.done and type(node.ops[0]) in OPPOSITE:
            self.done = True
            node.ops[0] = OPPOSITE[type(node.ops[0])]()
            return node
        return self.generic_visit(node)


def mutants(record: dict[str, Any]) -> dict[str, str]:
    """The solution of a HumanEval record with a wrong constant, a comparison turned round, and an early return.

    Only the function that is asked for is changed: helpers in the prompt are the tests' own.
    """
    found = {}
    for kind in ("constant", "comparison", "return"):
        tree, mutation = ast.parse(record["prompt"] + record["canonical_solution"]), _Mutation(kind)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        entry = [function for function in functions if function.name == record["entry_point"]][-1]
        if kind == "return":
            entry.body.insert(1, ast.parse("return None").body[0])
        else:
            mutation.visit(entry)
        if mutation.done or kind == "return":
            found[kind] = ast.unparse(tree)
    return found


_PLAIN = """
import json, resource, signal, sys
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
verdicts = open(int(sys.argv[1]), "w")  # stdout and stderr are the programs'
for record, program in json.load(sys.stdin):
    signal.alarm(5)
    try:
        scope = {"__name__": "plain"}
        exec(program + "\\n" + record["test"], scope)
        scope["check"](scope[record["entry_point"]])
        verdicts.write("1")
    except BaseException:
        verdicts.write("0")
    signal.alarm(0)
"""


def plainly(pairs: list[tuple[dict[str, Any], str]]) -> list[bool]:
    """Whether each program passes its record's tests, found out in one plain process. For programs that one trusts."""
    with tempfile.TemporaryFile("w+") as verdicts:
        fd = verdicts.fileno()
        command = [sys.executable, "-c", _PLAIN, str(fd)]
        subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True, pass_fds=(fd,))
        verdicts.seek(0)
        return [verdict == "1" for verdict in verdicts.read()]
