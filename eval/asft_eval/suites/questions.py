"""What evaluation suites ask: the questions alone, for finding them in training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asft_eval.errors import EvaluationError
from asft_eval.suites.load import find_file, read_rows
from asft_eval.suites.published import SUITES, spread, unknown


def asked_by(names: Sequence[str]) -> dict[str, list[str]]:
    """Suite -> its questions, in its order.

    Args:
        names: published suites or their ids on the hub, groups of them, JSON Lines files with a `prompt` field.

    Raises:
        EvaluationError: there is no such suite or file, or it holds something else.
    """
    return {name: questions(name) for name in spread(names)}


def questions(suite: str) -> list[str]:
    """The questions of one suite or file; see `asked_by`."""
    (suite,) = spread([suite])
    if suite in SUITES:
        file, field = find_file(suite), SUITES[suite].field
    else:
        file, field = Path(suite), "prompt"
    if not file.is_file():
        raise unknown(suite)
    rows = read_rows(file)
    if not rows:
        raise EvaluationError(f"{file} has no row: give it at least one")
    try:
        found: list[object] = [row[field] for row in rows]
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file} has a row without the text '{field}' ({error!r}): correct the file"
        ) from error
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise EvaluationError(f"{file} has a row without the text '{field}': correct the file")
    return texts
