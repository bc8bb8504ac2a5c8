"""Values that cross from one sandbox to another, as JSON: plain data by value, nothing that could carry code.

A subclass of a plain type crosses as that type, so an object that calls itself equal to everything does not arrive. What is
not plain data arrives as an `Opaque`, which equals nothing. Runs inside the sandbox: imports the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO, cast

MESSAGE_BYTES = 16 << 20
_ITEMS_OF_AN_ITERATOR = 100_000
_SAFE_INTEGER = 1 << 53


class Opaque:
    """Stands for a value that is not plain data; equals nothing but itself."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<a value of type {self.kind}, which is not plain data>"


class BrokenChannelError(Exception):
    """The other end is gone, or what it wrote is no message."""


def send(channel: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message."""
    channel.write(json.dumps(message).encode() + b"\n")
    channel.flush()


def receive(channel: BinaryIO) -> dict[str, Any]:
    """Read one message.

    Raises:
        BrokenChannelError: see the class.
    """
    line = channel.readline(MESSAGE_BYTES)
    if not line:
        raise BrokenChannelError("it ended")
    if not line.endswith(b"\n"):
        raise BrokenChannelError(f"it answered more than {MESSAGE_BYTES >> 20} MiB")
    try:
        message: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BrokenChannelError("it wrote something else than an answer") from error
    if not isinstance(message, dict):
        raise BrokenChannelError("it wrote something else than an answer")
    return cast(dict[str, Any], message)


def encode(value: Any) -> Any:
    """A JSON value for `decode`."""
    try:
        return _encode(value)
    except RecursionError:
        return {"opaque": f"{type(value).__name__} (nested too deep)"}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < _SAFE_INTEGER else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return _items(cast(list[Any], value))
    for kind, name, parts in _ENCODERS:
        if isinstance(value, kind):
            return {name: parts(value)}
    if type(value).__module__.partition(".")[0] == "numpy" and getattr(value, "ndim", None) == 0:
        return _encode(value.item())
    if isinstance(value, Iterator):
        return _encode_iterator(cast(Iterator[Any], value))
    return {"opaque": type(value).__name__}


def _encode_iterator(values: Iterator[Any]) -> Any:
    items: list[Any] = []
    for item in values:
        items.append(_encode(item))
        if len(items) > _ITEMS_OF_AN_ITERATOR:
            return {"opaque": f"{type(values).__name__} of more than {_ITEMS_OF_AN_ITERATOR} items"}
    return {"iterator": items}


def _items(values: Any) -> list[Any]:
    return [_encode(item) for item in values]


def _pairs(value: dict[Any, Any]) -> list[Any]:
    items = cast(Any, dict).items(value)  # of the plain type: a subclass may show something else
    return [[_encode(key), _encode(item)] for key, item in items]


_EMPTY: dict[str, str] = {}
_ENCODERS: tuple[tuple[type[Any], str, Callable[[Any], Any]], ...] = (
    (tuple, "tuple", _items),
    (dict, "dict", _pairs),
    (set, "set", _items),
    (frozenset, "frozenset", _items),
    (deque, "deque", _items),
    (type(_EMPTY.keys()), "set", _items),
    (type(_EMPTY.values()), "list", _items),
    (type(_EMPTY.items()), "set", _items),
    (range, "range", lambda value: [value.start, value.stop, value.step]),
    (bytes, "bytes", lambda value: value.hex()),
    (bytearray, "bytearray", lambda value: value.hex()),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (Fraction, "fraction", str),
    (Decimal, "decimal", str),
)
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda word: int(word, 16),
    "tuple": lambda items: tuple(decode(item) for item in items),
    "list": lambda items: [decode(item) for item in items],
    "dict": lambda pairs: {decode(key): decode(value) for key, value in pairs},
    "set": lambda items: {decode(item) for item in items},
    "frozenset": lambda items: frozenset(decode(item) for item in items),
    "deque": lambda items: deque(decode(item) for item in items),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "range": lambda parts: range(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "fraction": Fraction,
    "decimal": Decimal,
    "opaque": Opaque,
}


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        BrokenChannelError: `encode` did not write this.
    """
    if isinstance(value, list):
        return [decode(item) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    try:
        ((name, content),) = cast(dict[str, Any], value).items()
        return _DECODERS[name](content)
    except (KeyError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise BrokenChannelError("it wrote something else than an answer") from error


def allow_long_integers() -> None:
    """Answers may have more digits than Python turns into text by default."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
