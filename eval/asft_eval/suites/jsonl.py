"""Suites as JSON lines: one object a line, a prompt field and an answer field, optionally an `id`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from asft_eval.errors import EvaluationError
from asft_eval.types import Example, Suite


def load_jsonl(
    path: Path | str,
    *,
    name: str | None = None,
    version: str = "1",
    grader: str = "exact_match",
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> Suite:
    """Read a suite; its name is the file's unless given, an example's id its line number unless the line has an `id`.

    Raises:
        EvaluationError: no such file, no example, bad lines (the first is named, all are counted), or an id used twice.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"there is no suite file {path}: check the path")
    examples: list[Example] = []
    places: list[int] = []
    bad: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    examples.append(_example(line, number, prompt_field, answer_field))
                    places.append(number)
                except ValueError as error:
                    bad.append(f"line {number}: {error}")
    if bad:
        raise EvaluationError(f"{path} has {len(bad)} bad line(s), the first is {bad[0]}: correct the file")
    _require_unique(path, examples, places)
    return checked(Suite(name or path.stem, version, grader, tuple(examples)))


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
    rows = ({"id": e.id, "prompt": e.prompt, "answer": e.answer} for e in suite.examples)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _example(line: str, number: int, prompt_field: str, answer_field: str) -> Example:
    record: object = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    fields = cast(Mapping[str, object], record)
    texts: list[str] = []
    for field in (prompt_field, answer_field):
        value = fields.get(field)
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"field {field!r} is missing or empty")
        texts.append(str(value))
    return Example(str(fields.get("id", number)), texts[0], texts[1])


def checked(suite: Suite) -> Suite:
    """The suite, if it has an example and no id twice."""
    if not suite.examples:
        raise EvaluationError(f"suite {suite.name} has no example: give it at least one")
    identifier, count = Counter(example.id for example in suite.examples).most_common(1)[0]
    if count > 1:
        raise EvaluationError(f"suite {suite.name} uses the id {identifier} {count} times: make ids unique")
    return suite
