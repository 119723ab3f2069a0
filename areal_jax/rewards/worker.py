"""The inside of one verifier process: reads calls from a pipe, runs the functions they name, writes what they returned.

Started by `process.WorkerProcess`, one call at a time. Frames are a little-endian uint32 length and that many bytes of
msgpack. It imports neither jax nor torch, and what a verifier prints goes to stderr, never into the protocol.
"""

import asyncio
import functools
import inspect
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from areal_jax.rewards.loading import accepted, load_verifier, parameters_of
from areal_jax.rewards.outcome import BadReturn, Failure, Score, VerifierTimeout, as_score, plain_text

INSIDE_WORKER = "AREAL_JAX_VERIFIER_WORKER"  # set in the environment of a worker: whoever started it will also kill it
LENGTH = struct.Struct("<I")


class Call(msgspec.Struct):
    """One call: the function's import path, and everything that may be passed to it."""

    path: str
    fields: dict[str, Any]


class Reply(msgspec.Struct, omit_defaults=True):
    """`stage` is `ready` (started), `running` (imported, the clock of the call starts) or `done` with one outcome.

    `running` is said in the first call of a verifier only: later ones have nothing to import, and their clock starts
    when they are sent.
    """

    stage: str
    score: Score | None = None
    failure: Failure | None = None


def die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends; does nothing on other systems."""
    if sys.platform != "linux":
        return
    import ctypes

    set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_pdeathsig, signal.SIGKILL, 0, 0, 0)


@functools.cache
def _loaded(path: str) -> tuple[Callable[..., Any], list[inspect.Parameter]]:
    function = load_verifier(path)
    return function, parameters_of(function)


def run_call(call: Call, loop: asyncio.AbstractEventLoop, started: Callable[[], None] | None) -> Score | Failure:
    """Runs one call. Every error becomes a `Failure`.

    `started` is given for the first call of a verifier, and called between the import and the function.
    """
    begin = time.monotonic()
    try:
        function, parameters = _loaded(call.path)
        fields = accepted(function, call.fields, parameters)
        if started is not None:
            getattr(function, "warm_up", lambda: None)()  # its slow imports do not count against its time limit
            started()
        begin = time.monotonic()
        value = function(**fields)
        if inspect.isawaitable(value):
            value = loop.run_until_complete(value)
        return as_score(value, seconds=time.monotonic() - begin)
    except VerifierTimeout as error:
        return Failure(kind="timeout", text=plain_text(str(error), 2000), seconds=time.monotonic() - begin)
    except BadReturn as error:
        text = plain_text(f"{call.path}: {error}", 2000)
        return Failure(kind="bad_return", text=text, seconds=time.monotonic() - begin)
    except BaseException as error:  # SystemExit and the like must not end the worker
        text = f"{call.path}: {type(error).__name__}: {error}"
        return Failure(kind="exception", text=plain_text(text, 2000), seconds=time.monotonic() - begin)


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes of `stream`, or fewer at its end."""
    parts = bytearray()
    while len(parts) < size and (part := stream.read(size - len(parts))):
        parts += part
    return bytes(parts)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answers calls until `source` ends."""
    loop = asyncio.new_event_loop()
    decode = msgspec.msgpack.Decoder(Call).decode
    encode = msgspec.msgpack.Encoder().encode

    def send(reply: Reply) -> None:
        frame = encode(reply)
        sink.write(LENGTH.pack(len(frame)) + frame)
        sink.flush()

    called: set[str] = set()
    send(Reply("ready"))
    while len(header := read_exactly(source, LENGTH.size)) == LENGTH.size:
        (size,) = LENGTH.unpack(header)
        frame = read_exactly(source, size)
        if len(frame) < size:
            return
        call = decode(frame)

        def started(path: str = call.path) -> None:
            called.add(path)
            send(Reply("running"))

        outcome = run_call(call, loop, None if call.path in called else started)
        if isinstance(outcome, Score):
            send(Reply("done", score=outcome))
        else:
            send(Reply("done", failure=outcome))


def main() -> None:
    """Takes the protocol's pipes off stdin and stdout, limits memory (argument: bytes, 0 for none), and serves."""
    die_with_parent()
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.environ[INSIDE_WORKER] = "1"
    serve(source, sink)
