"""What runs around a program inside the sandbox: as a script, or as a server of its functions.

The code is sent into the child by `sandbox`; it imports only the standard library. The program's process holds nothing
but the program, and the arguments of the calls that it answers.
"""

import os
import sys
import types
from typing import Any

from areal_jax.rewards.exchange import PeerGone, decode, describe, encode, read_frame, write_frame


def run_module(source: str, name: str, filename: str) -> types.ModuleType:
    """Executes `source` as a new module; tracebacks show its lines. Returns the module."""
    import linecache

    module = types.ModuleType(name)
    sys.modules[name] = module
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    return module


def script(spec: dict) -> None:
    """Runs the program as a script: stdin in, stdout out."""
    sys.argv = ["program.py"]
    run_module(spec["program"], "__main__", "program.py")


def calls(spec: dict) -> None:
    """Calls one function of the program with each of `spec["calls"]`, and writes a frame for each result."""
    module = run_module(spec["program"], "candidate", "program.py")
    name = spec["entry_point"]
    for encoded in spec["calls"]:
        arguments = decode(encoded, lambda *_: None)
        owner = module if hasattr(module, name) or not hasattr(module, "Solution") else module.Solution()
        try:
            frame = {"ok": encode(getattr(owner, name)(*arguments), lambda value: ["o", 0, type(value).__name__])}
        except Exception as error:
            frame = {"error": describe(error)}
        write_frame(spec["write_fd"], frame)


def serve(spec: dict) -> None:
    """Loads the program and answers requests for its names until the pipe closes."""
    source, sink = spec["read_fd"], spec["write_fd"]
    objects: list[Any] = []
    module: types.ModuleType | None = None

    def keep(value: Any) -> list:
        objects.append(value)
        return ["o", ["o", len(objects) - 1], str(getattr(value, "__name__", type(value).__name__))]

    def find(target: list) -> Any:
        kind, which, *path = target
        value = objects[which] if kind == "o" else vars(module)[which]
        for name in path:
            value = getattr(value, name)
        return value

    def answer(request: dict) -> Any:
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
            return encode(value[decode(request["key"], lambda target, _: find(target))], keep)
        arguments = [decode(item, lambda target, _: find(target)) for item in request["args"]]
        named = {name: decode(item, lambda target, _: find(target)) for name, item in request["kwargs"].items()}
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
            os._exit(0)  # nobody waits for what the interpreter does at its end
        try:
            reply = {"ok": answer(request)}
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": names, "text": describe(error).partition(": ")[2]}
        write_frame(sink, reply)


def main(spec: dict) -> None:
    """Plays `spec["role"]`; the confinement is in force."""
    {"script": script, "calls": calls, "serve": serve}[spec["role"]](spec)
