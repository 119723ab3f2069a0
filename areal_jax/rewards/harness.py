"""What runs inside the sandbox around foreign code: a script runner, a server for a program's functions, a test runner.

The code is sent into the child by `sandbox`; it imports only the standard library. A program and the tests that judge
it run in two processes. The tests see the program only through `Remote` objects that send calls over a pipe, and what
comes back is rebuilt from plain JSON, so a result is always a true int, list, str, ...: no object of the program, with
methods of its own, ever reaches an assertion. The program's process holds nothing but the program and its arguments.
"""

import ast
import builtins
import collections
import decimal
import fractions
import json
import os
import struct
import sys
import traceback
import types

_FRAME = struct.Struct("<I")
MAX_FRAME = 16 << 20


class PeerGone(Exception):
    """The other end of the pipe closed, or sent what is not a frame."""


class Unsendable(TypeError):
    """A test passes something that cannot be sent to the program's process."""


def write_frame(fd, value):
    """Writes `value` as JSON."""
    data = json.dumps(value).encode()
    view = memoryview(_FRAME.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd):
    """The next value; raises `PeerGone`."""

    def read(size):
        data = bytearray()
        while len(data) < size:
            part = os.read(fd, min(size - len(data), 1 << 20))
            if not part:
                raise PeerGone("the program ended")
            data += part
        return bytes(data)

    (size,) = _FRAME.unpack(read(_FRAME.size))
    if size > MAX_FRAME:
        raise PeerGone("the program sent more than 16 MiB")
    try:
        return json.loads(read(size))
    except (ValueError, RecursionError):
        raise PeerGone("the program sent what is not a value") from None


def split_frames(data):
    """The values of the whole frames in `data`; raises `PeerGone` at one that is malformed."""
    while len(data) >= _FRAME.size:
        (size,) = _FRAME.unpack_from(data)
        if len(data) < _FRAME.size + size:
            return
        try:
            yield json.loads(data[_FRAME.size : _FRAME.size + size])
        except (ValueError, RecursionError):
            raise PeerGone("the program sent what is not a value") from None
        data = data[_FRAME.size + size :]


def encode(value, other):
    """`value` as JSON; `other(value)` encodes what is not plain data."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        value = int.__index__(value)
        return value if abs(value) < 1 << 53 else ["i", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    for tag, of in (("l", list), ("t", tuple), ("s", set), ("z", frozenset), ("q", collections.deque)):
        if isinstance(value, of):
            return [tag, [encode(item, other) for item in value]]
    if isinstance(value, dict):
        return ["d", [[encode(key, other), encode(item, other)] for key, item in value.items()]]
    if kind is complex:
        return ["c", value.real, value.imag]
    if kind in (bytes, bytearray):
        return ["b", value.hex()]
    if kind is fractions.Fraction:
        return ["F", str(value)]
    if kind is decimal.Decimal:
        return ["D", str(value)]
    if getattr(kind, "__module__", "").partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), other)
    return other(value)


_CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": collections.deque}


def decode(data, other):
    """The value that `encode` made `data` of; `other(id, name)` for an object that stayed there. Raises `PeerGone`."""
    if data is None or isinstance(data, bool | str | int | float):
        return data
    try:
        tag = data[0]
        if tag in _CONTAINERS:
            return _CONTAINERS[tag]([decode(item, other) for item in data[1]])
        if tag == "d":
            return {decode(key, other): decode(value, other) for key, value in data[1]}
        if tag == "i":
            return int(data[1], 16)
        if tag == "c":
            return complex(data[1], data[2])
        if tag == "b":
            return bytes.fromhex(data[1])
        if tag == "F":
            return fractions.Fraction(data[1])
        if tag == "D":
            return decimal.Decimal(data[1])
        if tag == "o":
            return other(int(data[1]), str(data[2]))
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
        pass
    raise PeerGone("the program sent what is not a value")


def run_module(source, name, filename):
    """Executes `source` as a new module; tracebacks show its lines. Returns the module."""
    import linecache

    module = types.ModuleType(name)
    sys.modules[name] = module
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    return module


# --- The program's side: a script, or a server of its functions ----------------------------------------------------


def script(spec):
    """Runs the program as a script: stdin in, stdout out."""
    sys.argv = ["program.py"]
    run_module(spec["program"], "__main__", "program.py")


def calls(spec):
    """Calls one function of the program with each of `spec["calls"]`, and writes a frame for each result."""
    module = run_module(spec["program"], "candidate", "program.py")
    name = spec["entry_point"]
    for arguments in spec["calls"]:
        owner = module if hasattr(module, name) or not hasattr(module, "Solution") else module.Solution()
        try:
            frame = {"ok": encode(getattr(owner, name)(*arguments), lambda value: ["o", 0, type(value).__name__])}
        except Exception as error:
            frame = {"error": _describe(error)}
        write_frame(spec["write_fd"], frame)


def serve(spec):
    """Loads the program and answers requests for its names until the pipe closes."""
    source, sink = spec["read_fd"], spec["write_fd"]
    objects = []
    module = None

    def keep(value):
        objects.append(value)
        return ["o", len(objects) - 1, getattr(value, "__name__", type(value).__name__)]

    def find(target):
        kind, which, *path = target
        value = objects[which] if kind == "o" else vars(module)[which]
        for name in path:
            value = getattr(value, name)
        return value

    def answer(request):
        nonlocal module
        if module is None:
            module = run_module(spec["program"], "candidate", "program.py")
        operation = request["op"]
        if operation == "have":
            return [name for name in request["names"] if name in vars(module)]
        value = find(request["target"])
        if operation == "get":
            return encode(value, keep)
        if operation == "len":
            return len(value)
        if operation == "list":
            return encode(list(value), keep)
        if operation == "item":
            return encode(value[decode(request["key"], lambda which, _: objects[which])], keep)
        arguments = [decode(item, lambda which, _: objects[which]) for item in request["args"]]
        named = {name: decode(item, lambda which, _: objects[which]) for name, item in request["kwargs"].items()}
        result = encode(value(*arguments, **named), keep)
        if not request["in_place"]:
            return {"result": result, "changed": {}}
        after = [encode(item, keep) if isinstance(item, list | dict | set) else None for item in arguments]
        changed = {i: new for i, (new, old) in enumerate(zip(after, request["args"])) if new is not None and new != old}
        return {"result": result, "changed": changed}

    while True:
        try:
            request = read_frame(source)
        except PeerGone:
            return
        try:
            reply = {"ok": answer(request)}
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": names, "text": _describe(error).partition(": ")[2]}
        write_frame(sink, reply)


def _describe(error):
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300]


# --- The tests' side -----------------------------------------------------------------------------------------------


class RemoteError(Exception):
    """The program raised something that is not a built-in exception."""


class Peer:
    """The program's process, as the tests' process sees it."""

    def __init__(self, read_fd, write_fd, in_place):
        self.read_fd, self.write_fd, self.in_place = read_fd, write_fd, in_place
        self.seen = {}

    def ask(self, **request):
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

    def value(self, data):
        return decode(data, self.object)

    def object(self, which, name):
        return self.seen.setdefault(which, Remote(self, ["o", which], name))


def _send(value):
    def handle(value):
        if type(value) is Remote and value._Remote__target[0] == "o" and len(value._Remote__target) == 2:
            return ["o", value._Remote__target[1], ""]
        raise Unsendable(
            f"the tests pass a {type(value).__name__} to the program: it cannot be sent to another process"
        )

    return encode(value, handle)


class Remote:
    """A function or an object of the program. Equal only to itself; everything about it is asked over the pipe."""

    def __init__(self, peer, target, name):
        self.__peer, self.__target, self.__name__ = peer, target, name

    def __call__(self, *arguments, **named):
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

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        target = [*self.__target, name]
        value = self.__peer.value(self.__peer.ask(op="get", target=target))
        return Remote(self.__peer, target, name) if isinstance(value, Remote) else value

    def __len__(self):
        length = self.__peer.ask(op="len", target=self.__target)
        if type(length) is not int:
            raise PeerGone("the program sent what is not a length")
        return length

    def __bool__(self):
        return True

    def __iter__(self):
        return iter(self.__peer.value(self.__peer.ask(op="list", target=self.__target)))

    def __getitem__(self, key):
        return self.__peer.value(self.__peer.ask(op="item", target=self.__target, key=_send(key)))


class _DropSolutionImport(ast.NodeTransformer):
    """`from solution import f`: the program's names are there anyway."""

    def visit_ImportFrom(self, node):
        return ast.copy_location(ast.Pass(), node) if node.module == "solution" else node


def run_tests(spec):
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
        return {"passed": 0, "total": total, "reason": f"program: {_describe(error)}"}

    def attempt(run):
        nonlocal passed, reason
        try:
            run()
            passed += 1
        except Unsendable as error:
            return {"broken": str(error)}
        except ModuleNotFoundError as error:
            if error.name:  # raised here, not by the program
                return {"broken": f"the tests need a module that is not there: {error}"}
            reason = reason or _describe(error)
        except PeerGone as error:
            reason = reason or str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = reason or ("wrong_answer" if type(error) is AssertionError else _describe(error))
            reason += f" (tests.py:{last.lineno})" if last.filename == "tests.py" and len(tests) == 1 else ""
        return None

    broken = attempt(lambda: exec(setup, scope))
    if broken or reason:
        return broken or {"passed": 0, "total": total, "reason": reason}
    passed = 0
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


def main(spec):
    """Plays `spec["role"]`; the confinement is in force."""
    if spec["packages"]:
        sys.path += spec["packages"]
    if spec["role"] == "script":
        script(spec)
    elif spec["role"] == "calls":
        calls(spec)
    elif spec["role"] == "serve":
        serve(spec)
    else:
        write_frame(spec["write_fd"], run_tests(spec))
