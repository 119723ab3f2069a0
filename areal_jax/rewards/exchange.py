"""What crosses the pipe between a program under test and those who judge it: JSON frames that stand for plain values.

Runs on both sides of the sandbox and imports only the standard library. What is decoded is always a true int, list,
str, ...: no object of the program, with methods of its own, ever reaches an assertion.
"""

import collections
import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

_FRAME = struct.Struct("<I")
MAX_FRAME = 16 << 20
_MAX_DIGITS = 10_000  # of fractions and decimals, whose arithmetic is slower than linear


class PeerGone(Exception):
    """The other end of the pipe closed, or sent what is not a frame."""


def write_frame(fd: int, value: Any) -> None:
    """Writes `value` as JSON."""
    data = json.dumps(value).encode()
    view = memoryview(_FRAME.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int) -> Any:
    """The next value; raises `PeerGone`."""

    def read(size: int) -> bytes:
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


def split_frames(data: bytes) -> Iterator[Any]:
    """The values of the whole frames in `data`; raises `PeerGone` at one that is malformed."""
    begin = _FRAME.size
    while begin <= len(data):
        (size,) = _FRAME.unpack_from(data, begin - _FRAME.size)
        end = begin + size
        if end > len(data):
            return
        try:
            yield json.loads(data[begin:end])
        except (ValueError, RecursionError, MemoryError):
            raise PeerGone("the program sent what is not a value") from None
        begin = end + _FRAME.size


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
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
    module = str(getattr(kind, "__module__", "")).partition(".")[0]
    if (module, kind.__name__) == ("fractions", "Fraction"):
        return ["f", hex(value.numerator), hex(value.denominator)]
    if (module, kind.__name__) == ("decimal", "Decimal"):
        return ["m", str(value)]
    if module == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), other)
    return other(value)


_CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": collections.deque}


def decode(data: Any, other: Callable[[list, str], Any]) -> Any:
    """The value that `encode` made `data` of; `other(target, name)` for an object that stayed. Raises `PeerGone`."""
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
        if tag in ("f", "m") and max(map(len, data)) > _MAX_DIGITS:
            raise ValueError
        if tag == "f":
            from fractions import Fraction

            return Fraction(int(data[1], 16), int(data[2], 16))  # never from a text: "1e999999999" takes for ever
        if tag == "m":
            from decimal import Decimal

            return Decimal(data[1])
        if tag == "o":
            return other(list(data[1]), str(data[2]))
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
        pass
    raise PeerGone("the program sent what is not a value")


def decode_json(data: Any) -> Any:
    """The JSON value that `encode` made `data` of, for a comparison outside of any sandbox. Raises `PeerGone`.

    Tuples and deques become lists, and dicts have texts as keys, as in JSON. What JSON cannot say (sets, objects, keys
    that are containers) becomes `PeerGone`, the class, which equals no value. Only texts are ever hashed: a program
    that chooses what is hashed can choose a million numbers with one hash.
    """
    if data is None or isinstance(data, bool | str | int | float):
        return data
    try:
        tag = data[0]
        if tag in ("l", "t", "q"):
            return [decode_json(item) for item in data[1]]
        if tag == "i":
            return int(data[1], 16)
        if tag == "d":
            items = [(decode_json(key), decode_json(value)) for key, value in data[1]]
            if all(key is None or isinstance(key, bool | str | int | float) for key, _ in items):
                return {str(key): value for key, value in items}  # ValueError: an int with thousands of digits
    except (LookupError, TypeError, ValueError, RecursionError, MemoryError):
        raise PeerGone("the program sent what is not a value") from None
    return PeerGone


def describe(error: BaseException) -> str:
    """The error's type and text, whatever its `__str__` does."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300]
