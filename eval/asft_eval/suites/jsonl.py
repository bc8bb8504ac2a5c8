"""Suites as JSON lines: one object a line, a prompt field and an answer field, optionally an `id` and a `grader`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from asft_eval.errors import EvaluationError
from asft_eval.text_files import bare_name, numbered, parsed, read_text
from asft_eval.types import Example, Suite

_GRADERS = ("exact_match", "math")
"""Those that need no more than a prompt and an answer; the first unless a file names another."""


def load_jsonl(
    path: Path | str,
    *,
    name: str | None = None,
    version: str = "1",
    grader: str | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> Suite:
    """Read a suite, gzipped or not.

    Args:
        path: the file.
        name: of the suite; None = the file's.
        version: of the suite.
        grader: None = the one that all rows name as `grader`, `exact_match` where none names one.
        prompt_field: of a row.
        answer_field: of a row. Its id is the line's number unless it has an `id`.

    Raises:
        EvaluationError: no such file, no text, no example, bad lines (the first is named, all are counted), rows of several graders, or an id
            used twice.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"there is no suite file {path}: check the path")
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as text ({error}): give JSON Lines in UTF-8") from error
    examples: list[Example] = []
    places: list[int] = []
    graders: dict[str | None, int] = {}
    bad: list[str] = []
    for number, line in numbered(text):
        try:
            example, named = _example(line, number, prompt_field, answer_field)
        except ValueError as error:
            bad.append(f"line {number}: {error}")
            continue
        examples.append(example)
        places.append(number)
        graders.setdefault(named, number)
    if bad:
        raise EvaluationError(f"{path} has {len(bad)} bad line(s), the first is {bad[0]}: correct the file")
    _require_unique(path, examples, places)
    if grader is None:
        grader = _one_grader(path, graders)
    return checked(Suite(name or bare_name(path).stem, version, grader, tuple(examples)))


def _one_grader(path: Path, graders: Mapping[str | None, int]) -> str:
    """A suite has one grader: every row names it, or none does."""
    if len(graders) > 1:
        (one, first), (other, second) = list(graders.items())[:2]
        raise EvaluationError(
            f"{path} names the grader {one or '(none)'} in line {first} and {other or '(none)'} in line {second}: name one in all lines, or make two files"
        )
    return next(iter(graders), None) or _GRADERS[0]


def _require_unique(path: Path, examples: Sequence[Example], places: Sequence[int]) -> None:
    seen: dict[str, int] = {}
    for example, place in zip(examples, places, strict=True):
        if example.id in seen:
            raise EvaluationError(
                f"{path} uses the id {example.id} in lines {seen[example.id]} and {place}: make ids unique"
            )
        seen[example.id] = place


def suite_from_pairs(
    name: str, pairs: Iterable[tuple[str, str]], *, version: str = "1", grader: str = "exact_match"
) -> Suite:
    """A suite of (prompt, answer) pairs; ids count from 1."""
    examples = (Example(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs, start=1))
    return checked(Suite(name, version, grader, tuple(examples)))


def write_jsonl(path: Path, suite: Suite) -> None:
    """Write the examples of a suite so that `load_jsonl` reads them back."""
    grader = {} if suite.grader == _GRADERS[0] else {"grader": suite.grader}
    rows = ({"id": e.id, "prompt": e.prompt, "answer": e.answer, **grader} for e in suite.examples)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _example(line: str, number: int, prompt_field: str, answer_field: str) -> tuple[Example, str | None]:
    record: object = parsed(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    fields = cast(Mapping[str, object], record)
    texts: list[str] = []
    for field in (prompt_field, answer_field):
        value = fields.get(field)
        if isinstance(value, bool):  # Python's word for it, True, is no answer that anybody asked for
            raise ValueError(
                f"field {field!r} is {json.dumps(value)}, neither a text nor a number (put it in quotes where the word is meant)"
            )
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"field {field!r} is missing or empty")
        texts.append(str(value))
    named = fields.get("grader")
    if named is not None and named not in _GRADERS:
        raise ValueError(f"the grader is {named!r}, and a file's may be {' or '.join(_GRADERS)}")
    return Example(_id(fields.get("id"), number), texts[0], texts[1]), cast(str | None, named)


def _id(given: object, number: int) -> str:
    if given is None:
        return str(number)
    if not isinstance(given, str | int | float) or isinstance(given, bool) or not str(given).strip():
        raise ValueError("the id is neither a text nor a number")
    return str(given)


def checked(suite: Suite) -> Suite:
    """The suite, if it has an example and no id twice."""
    if not suite.examples:
        raise EvaluationError(f"suite {suite.name} has no example: give it at least one")
    identifier, count = Counter(example.id for example in suite.examples).most_common(1)[0]
    if count > 1:
        raise EvaluationError(f"suite {suite.name} uses the id {identifier} {count} times: make ids unique")
    return suite
