"""From the names that `--suite` takes to suites: published ones, groups of them, and JSON Lines files of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from asft_eval.errors import EvaluationError
from asft_eval.suites.jsonl import checked, load_jsonl
from asft_eval.suites.prompts import PROMPTS, render
from asft_eval.suites.published import SUITES, Definition, is_hub_id, spread, unknown
from asft_eval.text_files import numbered, parsed, read_text
from asft_eval.types import Example, Suite

DATA_DIR_VARIABLE = "ASFT_DATA_DIR"


def load_suites(names: Sequence[str], *, prompt: str | None = None) -> list[Suite]:
    """Suites by name, by group (`math`, `medical`, ...) or by path, each once and in the order named.

    Args:
        names: published suites or their ids on the hub, groups of them, JSON Lines files with `prompt` and `answer`.
        prompt: the prompt variant of all suites whose prompt may be chosen; None = each suite's own.

    Raises:
        EvaluationError: no such suite or variant, a missing or damaged file, or a variant that no suite takes.
    """
    if prompt is not None and prompt not in PROMPTS:
        render(prompt, "")  # says which there are
    suites = spread(names)
    if prompt is not None and not any(name not in SUITES or SUITES[name].wraps for name in suites):
        raise EvaluationError(
            f"{', '.join(suites)} have one form of prompt alone: leave the prompt variant {prompt} out"
        )
    loaded: dict[str, str] = {}
    chosen: list[Suite] = []
    for name in suites:
        suite = load_suite(name, prompt=prompt)
        if suite.name in loaded:
            raise EvaluationError(
                f"{loaded[suite.name]} and {name} are both the suite {suite.name}, and results are told apart by that name: rename a file"
            )
        loaded[suite.name] = name
        chosen.append(suite)
    return chosen


def load_suite(name: str, *, prompt: str | None = None) -> Suite:
    """One suite; see `load_suites`."""
    (name,) = spread([name])
    if name not in SUITES:
        return _own_file(name, prompt or "raw")
    definition = SUITES[name]
    variant = prompt if prompt is not None and definition.wraps else definition.prompt
    file = find_file(name)
    examples: list[Example] = []
    for number, row in enumerate(read_rows(file), start=1):
        try:
            asked = definition.read(row)
            examples.append(
                Example(
                    asked.id or str(number), render(variant, asked.question), asked.answer, asked.question
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EvaluationError(
                f"row {number} of {file} is no row of {name} ({error!r}): {_cure(name, definition)}"
            ) from error
    if len(examples) != definition.rows:
        raise EvaluationError(
            f"{file} has {len(examples)} rows and {name} has {definition.rows}: {_cure(name, definition)}"
        )
    return checked(
        Suite(name, definition.version, definition.grader, tuple(examples), definition.choices, variant)
    )


def find_file(name: str) -> Path:
    """The file of a published suite: in the folder of ASFT_DATA_DIR, else in the hub's cache.

    Raises:
        EvaluationError: it is in neither; the message says how to get it.
    """
    definition = SUITES[name]
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if folder and (Path(folder) / definition.file).is_file():
        return Path(folder) / definition.file
    cached = _in_hub_cache(definition)
    if cached is not None:
        return cached
    raise EvaluationError(f"suite {name} is not here: {_cure(name, definition)}")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON array (`.json`) or of JSON Lines, gzipped or not.

    Raises:
        EvaluationError: it cannot be read as such.
    """
    try:
        text = read_text(file)
        return _array(text) if file.name.endswith(".json") else list(map(_row, numbered(text)))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file} cannot be read ({error}): get it again") from error


def _row(line: tuple[int, str]) -> dict[str, Any]:
    number, text = line
    try:
        return parsed(text)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _array(text: str) -> list[dict[str, Any]]:
    rows = parsed(text)
    if not isinstance(rows, list):
        raise ValueError("not a JSON array")
    return cast(list[dict[str, Any]], rows)


def _cure(name: str, definition: Definition) -> str:
    if definition.download:
        return f"run `asft data download {definition.download} --out DIR` and set {DATA_DIR_VARIABLE}=DIR"
    where = f" (the hub's {definition.hub.repo} has it)" if definition.hub else ""
    return f"put its file as {definition.file} into the folder that {DATA_DIR_VARIABLE} names{where}"


def _in_hub_cache(definition: Definition) -> Path | None:
    if definition.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found: object = try_to_load_from_cache(definition.hub.repo, definition.hub.path, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _own_file(name: str, variant: str) -> Suite:
    path = Path(name)
    if not path.is_file() and (is_hub_id(name) or (not path.suffix and len(path.parts) <= 1)):
        raise unknown(name)
    suite = load_jsonl(name)
    examples = tuple(
        replace(example, prompt=render(variant, example.prompt), question=example.prompt)
        if variant != "raw"
        else example
        for example in suite.examples
    )
    return replace(suite, examples=examples, prompt=variant)
