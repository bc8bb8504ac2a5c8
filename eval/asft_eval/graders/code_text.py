"""From what a model wrote to the program that is tested. Each decision is named, in the order of the rules below.

1. The text begins with an indented line: it continues the prompt, up to the first stop sequence.
2. It has a fenced block: the first block that defines the function is taken, else the first block; then as 3 to 5.
3. It defines the function: it is a whole program; the prompt's text before its own function (imports, helpers) goes first.
   Prose before and after is left out.
4. The prompt asks for no particular beginning (MBPP): the text is the program.
5. Otherwise it is a function body whose indentation got lost: it is indented, and continues the prompt.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

#: what ends a function body in the published HumanEval protocol (Chen et al. 2021, section 3)
STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")

_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BEGINS_CODE = re.compile(r"^(?:import |from |def |class |async def |@)", re.MULTILINE)
_MOST_CUTS = 50
_LONGEST = 200_000  # characters; no solution is as long, and the parser's memory grows with the text


@dataclass(frozen=True, slots=True)
class Program:
    """A program, and how it was read out of the completion."""

    code: str
    how: str


def program_of(completion: str, *, prompt: str, functions: Sequence[str]) -> Program:
    """The program that a completion stands for.

    Args:
        completion: what the model wrote.
        prompt: the beginning of a program that the model was to complete; empty where it was to write a whole one.
        functions: names that the tests call.
    """
    text = completion.replace("\r\n", "\n")[:_LONGEST]
    if not text.strip():
        return Program(prompt, "empty completion")
    whole = _definition(functions)
    if prompt and _indented(text) and not whole.search(textwrap.dedent(text).lstrip("\n")):
        return Program(prompt + _until_stop(text), "continues the prompt")
    blocks = [block.group(1) for block in _FENCE.finditer(text)]
    note = ""
    if blocks:
        chosen = next((i for i, block in enumerate(blocks) if whole.search(textwrap.dedent(block))), 0)
        text, note = blocks[chosen], f"fenced block {chosen + 1} of {len(blocks)}: "
    text = textwrap.dedent(text) if not prompt or whole.search(textwrap.dedent(text)) else text
    if whole.search(text):
        return Program(_before(prompt, functions) + _without_prose(text), f"{note}a whole program")
    if not prompt:
        return Program(_without_prose(text), f"{note}a program without {' or '.join(functions)}")
    if _indented(text):
        return Program(prompt + _until_stop(text), f"{note}continues the prompt")
    return Program(_reindented(prompt, text), f"{note}a function body, indented")


def _definition(functions: Sequence[str]) -> re.Pattern[str]:
    names = "|".join(map(re.escape, functions))
    return re.compile(rf"^(?:async +)?(?:def|class) +(?:{names})\b|^(?:{names}) *=", re.MULTILINE)


def _indented(text: str) -> bool:
    first = next(line for line in [*text.split("\n"), "x"] if line.strip())
    return first[0] in " \t"


def _until_stop(body: str) -> str:
    """A body up to the first stop sequence; a blank beginning does not count."""
    start = len(body) - len(body.lstrip())
    ends = [place for stop in STOP_SEQUENCES if (place := body.find(stop, start)) >= 0]
    return body[: min(ends, default=len(body))].rstrip() + "\n"


def _before(prompt: str, functions: Sequence[str]) -> str:
    """The prompt's imports and helpers: what stands before the function that is asked for."""
    place = _definition(functions).search(prompt)
    return prompt[: place.start()] if place else ""


def _without_prose(text: str) -> str:
    """The text from its first line of code to the last line with which it still parses."""
    if not _parses(text) and (begin := _BEGINS_CODE.search(text)):
        text = text[begin.start() :]
    lines = text.split("\n")
    for _ in range(_MOST_CUTS):
        error = _syntax_error("\n".join(lines))
        if error is None:
            return "\n".join(lines) + "\n"
        lines = lines[: max(min(error - 1, len(lines) - 1), 0)]
    return text


def _reindented(prompt: str, body: str) -> str:
    """The program whose body's lines all lost their indentation, or the first line alone did: whichever parses."""
    body = body.strip("\n")
    all_lines = prompt + textwrap.indent(body, "    ") + "\n"
    first_line = prompt + _until_stop("    " + body.lstrip())
    for program in (all_lines, first_line):
        if _parses(program):
            return program
    return _without_prose(first_line)


def _parses(text: str) -> bool:
    return _syntax_error(text) is None


def _syntax_error(text: str) -> int | None:
    """The line at which the text stops being Python; None where it is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in what a model wrote concern nobody
            ast.parse(text)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):  # a null byte, or nested beyond the parser's depth
        return 1
    return None
