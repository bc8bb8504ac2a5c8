"""What runs in the sandbox: a script; or a solution and, apart from it, the judge that calls it.

The verdict is made in a process in which no line of the completion runs: the solution's process is asked for values over a
socket, one call at a time, and knows neither the tests nor where a verdict goes. Printing "passed", ending early with
status 0, or replacing what `assert` and `==` mean changes nothing in the judge's process.

Runs inside the sandbox: imports the standard library alone.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from asft_eval.sandbox.wire import (
    BrokenChannelError,
    Opaque,
    allow_long_integers,
    decode,
    encode,
    receive,
    send,
)

_SHORT = 200  # characters of a value or a message in a reason


def script(payload: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Run `payload["code"]` as a module; it may write to the descriptors."""
    module = _module("__main__")
    module.__dict__["DESCRIPTORS"] = tuple(descriptors)
    exec(compile(payload["code"], "<script>", "exec"), module.__dict__)  # nosec B102 # in the sandbox


def solution(payload: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Load `payload["code"]`, then answer calls until the judge has no more."""
    sys.path.extend(payload["search"])
    channel = _channel(descriptors[0])
    module = _module("solution")
    try:
        exec(compile(payload["code"], "<completion>", "exec"), module.__dict__)  # nosec B102 # in the sandbox
    except BaseException as error:
        send(channel, {"raised": type(error).__name__, "text": _text(error)})
        return
    send(channel, {"value": None})
    while True:
        try:
            message = receive(channel)
        except BrokenChannelError:
            return
        send(channel, _answer(module, message))


def _answer(module: types.ModuleType, message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        function = module.__dict__[message["call"]]
    except KeyError:
        return {"raised": "NameError", "text": f"the program defines no {message['call']}"}
    try:
        arguments = decode(message["arguments"])
        keywords = decode(message["keywords"])
        return {"value": encode(function(*arguments, **keywords))}
    except BaseException as error:
        return {"raised": type(error).__name__, "text": _text(error)}


class _ProgramEnded(BaseException):
    """The solution's process is gone: no test may catch this."""


class _Candidate:
    """Calls a function of the solution's process; remembers what came last, for the reason."""

    def __init__(self, name: str, channel: BinaryIO, notes: dict[str, Any]):
        self._name, self._channel, self._notes = name, channel, notes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._notes["calls"] += 1
        shown = ", ".join([*map(repr, arguments), *(f"{k}={v!r}" for k, v in keywords.items())])
        self._notes["call"] = _short(f"{self._name}({shown})")
        message = {"call": self._name, "arguments": encode(arguments), "keywords": encode(keywords)}
        value = _ask(self._channel, message)
        self._notes["returned"] = value
        return value


def _ask(channel: BinaryIO, message: dict[str, Any] | None) -> Any:
    try:
        if message is not None:
            send(channel, message)
        answer = receive(channel)
        if "raised" not in answer:
            return decode(answer["value"])
    except (BrokenChannelError, OSError, KeyError) as error:
        raise _ProgramEnded(str(error)) from error
    raise _exception(str(answer["raised"]), str(answer.get("text", "")))


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError wants five arguments
            pass
    return type(name if name.isidentifier() else "Exception", (Exception,), {})(text)


def judge(payload: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Run `payload["tests"]` against the solution; write {"passed", "reason", "ended"} to the second descriptor.

    `helpers` runs first (functions of the prompt that tests call), then every name in `functions` stands for the solution's.
    `ended` says that the solution's process is gone; whoever started it knows why.
    """
    sys.path.extend(payload["search"])
    channel = _channel(descriptors[0])
    notes: dict[str, Any] = {"calls": 0, "call": "", "returned": None}
    passed, ended, reason = False, False, ""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        _ask(channel, None)
        exec(compile(payload["helpers"], "<prompt>", "exec"), names)  # nosec B102 # in the sandbox
        names.update({name: _Candidate(name, channel, notes) for name in payload["functions"]})
        exec(compile(payload["tests"], "<tests>", "exec"), names)  # nosec B102 # in the sandbox
        passed, reason = notes["calls"] > 0, f"all tests passed ({notes['calls']} calls)"
        if not passed:
            reason = "the tests called nothing"
    except _ProgramEnded as error:
        ended, reason = True, _where(notes, str(error))
    except BaseException as error:
        reason = _failure(error, payload["tests"], notes)
    with os.fdopen(descriptors[1], "wb") as verdict:
        send(verdict, {"passed": passed, "reason": reason, "ended": ended})


def _failure(error: BaseException, tests: str, notes: Mapping[str, Any]) -> str:
    if not notes["calls"]:
        return f"the program does not load: {type(error).__name__}: {_text(error)}"
    if isinstance(notes["returned"], Opaque):
        return f"{notes['call']} returned {notes['returned']!r}"
    if not isinstance(error, AssertionError):
        return _where(notes, f"{type(error).__name__}: {_text(error)}")
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    text = tests.splitlines()[line - 1].strip() if line else ""
    return _where(notes, f"returned {_short(repr(notes['returned']))}, failed: {_short(text)}")


def _where(notes: Mapping[str, Any], what: str) -> str:
    return f"{notes['call']}: {what}" if notes["calls"] else f"while loading: {what}"


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _channel(descriptor: int) -> BinaryIO:
    allow_long_integers()
    import socket

    return socket.socket(fileno=descriptor).makefile("rwb")  # type: ignore[return-value]


def _text(error: BaseException) -> str:
    try:
        return _short(str(error))
    except BaseException:  # a class of the completion whose own text fails
        return "no message"


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else text[:_SHORT] + " ..."


PROGRAMS: Mapping[str, Callable[[Mapping[str, Any], Sequence[int]], None]] = {
    "script": script,
    "solution": solution,
    "judge": judge,
}
