"""Assertions about a program that runs in another process.

The code is sent into a sandboxed child by `sandbox`; it imports only the standard library. The tests see the program
only through `Remote` objects, which send calls over a pipe. So no early exit, no patched builtin, no object with an
`__eq__` of its own and no look at the stack can make an assertion pass that should not.
"""

import ast
import builtins
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from areal_jax.rewards.exchange import PeerGone, decode, describe, encode, read_frame, write_frame


class Unsendable(TypeError):
    """A test passes something that cannot be sent to the program's process."""


class RemoteError(Exception):
    """The program raised something that is not a built-in exception."""


class Peer:
    """The program's process, as the tests' process sees it."""

    def __init__(self, read_fd: int, write_fd: int, in_place: bool):
        self.read_fd, self.write_fd, self.in_place = read_fd, write_fd, in_place
        self.seen: dict[int, Remote] = {}  # by number

    def ask(self, **request: Any) -> Any:
        """The program's answer; raises what the program raised, if that is a built-in exception, or `RemoteError`."""
        try:
            write_frame(self.write_fd, request)
        except BrokenPipeError:
            raise PeerGone("the program ended") from None
        reply = read_frame(self.read_fd)
        if not isinstance(reply, dict):
            raise PeerGone("the program sent what is not a reply")
        if "ok" in reply:
            return reply["ok"]
        names, text = reply.get("error"), str(reply.get("text", ""))[:300]
        for name in names if isinstance(names, list) else []:
            kind = getattr(builtins, name, None) if isinstance(name, str) else None
            if kind is Exception:
                break
            if isinstance(kind, type) and issubclass(kind, Exception):
                error = kind.__new__(kind)
                error.args = (text,)
                raise error
        raise RemoteError(f"{names[0] if isinstance(names, list) and names else 'unnamed'}: {text}"[:300])

    def value(self, data: Any) -> Any:
        """What `data` stands for here: plain data, or a `Remote`."""
        return decode(data, self.object)

    def object(self, target: list, name: str) -> "Remote":
        """The one `Remote` for an object that the program keeps by number."""
        kind, number = target
        if kind != "o" or type(number) is not int:
            raise ValueError
        return self.seen.setdefault(number, Remote(self, target, name))


def _send(value: Any) -> Any:
    def handle(value: Any) -> list:
        if type(value) is Remote:
            return ["o", value._Remote__target, ""]
        raise Unsendable(
            f"the tests pass a {type(value).__name__} to the program: it cannot be sent to another process"
        )

    return encode(value, handle)


class Remote:
    """A function or an object of the program. Equal only to itself; everything about it is asked over the pipe."""

    def __init__(self, peer: Peer, target: list, name: str):
        self.__peer, self.__target, self.__name__ = peer, target, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        reply = self.__peer.ask(
            op="call",
            target=self.__target,
            args=[_send(argument) for argument in arguments],
            kwargs={name: _send(argument) for name, argument in named.items()},
            in_place=self.__peer.in_place,
        )
        if not isinstance(reply, dict) or not isinstance(reply.get("changed"), dict):
            raise PeerGone("the program sent what is not a reply")
        for index, data in reply["changed"].items() if self.__peer.in_place else ():
            argument, new = arguments[int(index)], self.__peer.value(data)
            if type(argument) is type(new) and type(new) in (list, dict, set):
                argument.clear()
                (argument.extend if type(new) is list else argument.update)(new)
        return self.__peer.value(reply.get("result"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        target = [*self.__target, name]
        value = self.__peer.value(self.__peer.ask(op="get", target=target))
        return Remote(self.__peer, target, name) if isinstance(value, Remote) else value

    def __len__(self) -> int:
        length = self.__peer.ask(op="len", target=self.__target)
        if type(length) is not int:
            raise PeerGone("the program sent what is not a length")
        return length

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__peer.value(self.__peer.ask(op="list", target=self.__target)))

    def __getitem__(self, key: Any) -> Any:
        return self.__peer.value(self.__peer.ask(op="item", target=self.__target, key=_send(key)))


class _DropSolutionImport(ast.NodeTransformer):
    """`from solution import f`: the program's names are there anyway."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if node.module == "solution" else node


def run_tests(spec: dict) -> dict:
    """Runs the tests against the program behind the pipe and writes the verdict.

    The verdict is {"passed", "total", "reason"}, or {"broken": text} where the tests themselves are at fault.
    """
    peer = Peer(spec["read_fd"], spec["peer_fd"], spec["in_place"])
    try:
        parts = [_DropSolutionImport().visit(ast.parse(text)) for text in (spec["setup"], *spec["tests"])]
        setup, *tests = [compile(part, "tests.py", "exec", dont_inherit=True) for part in parts]
    except SyntaxError as error:
        return {"broken": f"the tests do not compile: {error}"}
    nodes = [node for part in parts for node in ast.walk(part)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    entry = [spec["entry_point"]] if spec["entry_point"] else []
    wanted = sorted({*read, *entry} - set(dir(builtins)))
    scope = types.ModuleType("tests").__dict__
    passed, reason, total = 0, "", max(1, len(tests))
    try:
        for name in peer.ask(op="have", names=wanted):
            if name in wanted:
                value = peer.value(peer.ask(op="get", target=["n", name]))
                scope[name] = Remote(peer, ["n", name], name) if isinstance(value, Remote) else value
        if entry:
            scope["candidate"] = scope[entry[0]]
    except KeyError:
        return {"passed": 0, "total": total, "reason": f"the program does not define {entry[0]}"}
    except PeerGone as error:
        return {"passed": 0, "total": total, "reason": str(error)}
    except Exception as error:
        return {"passed": 0, "total": total, "reason": f"program: {describe(error)}"}

    def attempt(run: Callable[[], Any]) -> dict | None:
        nonlocal passed, reason
        try:
            run()
            passed += 1
        except Unsendable as error:
            return {"broken": str(error)}
        except ModuleNotFoundError as error:
            if error.name:  # raised here, not by the program
                return {"broken": f"the tests need a module that is not there: {error}"}
            reason = reason or describe(error)
        except PeerGone as error:
            reason = reason or str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = reason or ("wrong_answer" if type(error) is AssertionError else describe(error))
            reason += f" (tests.py:{last.lineno})" if last.filename == "tests.py" and len(tests) == 1 else ""
        return None

    broken = attempt(lambda: exec(setup, scope))
    if broken or reason:
        return broken or {"passed": 0, "total": total, "reason": reason}
    passed = 0
    if entry:
        scope[entry[0]] = scope["candidate"]
    for test in tests:
        broken = attempt(lambda test=test: exec(test, scope))
        if broken:
            return broken
    own = [value for name, value in scope.items() if name.startswith("test_") and type(value) is types.FunctionType]
    if "check" in scope and entry:
        own.append(lambda: scope["check"](scope["candidate"]))
    if own and passed == len(tests):  # the tests are functions: defining them was not the test
        passed, total = 0, len(own)
        for function in own:
            broken = attempt(function)
            if broken:
                return broken
    return {"passed": passed, "total": total, "reason": reason}


def main(spec: dict) -> None:
    """Writes the verdict of `run_tests`."""
    write_frame(spec["write_fd"], run_tests(spec))
