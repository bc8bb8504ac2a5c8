"""Text to read a model on: JSON Lines of prompt and response or of text alone, or any text file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_eval.backends.hf import encode_pair
from asft_eval.errors import EvaluationError
from asft_eval.text_files import bare_name, decoded, numbered, parsed

WINDOW = 2048
"""Tokens of one text at most, fewer where the model knows fewer positions."""

_JSON = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The texts of a file, as tokens.

    Attributes:
        path: the file.
        sha256: of its bytes.
        window: tokens of one text at most.
        encoded: token ids and the number of the prompt's, of each text or part of one.
        cut: responses that lost their end to the window.
        left_out: rows whose prompt alone fills the window, or whose text is empty.
    """

    path: str
    sha256: str
    window: int
    encoded: Sequence[tuple[list[int], int]]
    cut: int
    left_out: int


def read_held_out(path: Path | str, tokenizer: Any, *, positions: int) -> HeldOut:
    """Reads and encodes a file.

    Of `{"prompt", "response"}` (or `"answer"`) the response and the end token after it are scored. `{"text"}` and files of any other kind
    are scored whole, in windows that each start anew.

    Args:
        path: a JSON Lines file, or any text in UTF-8; gzipped or not.
        tokenizer: of the model.
        positions: that the model knows.

    Raises:
        EvaluationError: the file is missing, damaged, or holds nothing to score.
    """
    path, window = Path(path), min(WINDOW, positions)
    try:
        raw = path.read_bytes()
        content = decoded(raw)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read as text ({error}): give a text or JSON Lines file"
        ) from None
    rows = _rows(path, content) if bare_name(path).suffix in _JSON else [(None, content)]
    encoded: list[tuple[list[int], int]] = []
    cut = left_out = 0
    for prompt, text in rows:
        if prompt is None:
            parts = _windows(tokenizer, text, window)
        else:
            whole, length = encode_pair(tokenizer, prompt, text, end=True)
            cut += length < window < len(whole)
            parts = [(whole[:window], length)] if length < window else []
        left_out += not parts
        encoded += parts
    if not encoded:
        raise EvaluationError(f"{path} holds no text to score: give rows of prompt and response, or of text")
    return HeldOut(str(path), hashlib.sha256(raw).hexdigest(), window, encoded, cut, left_out)


def _windows(tokenizer: Any, text: str, window: int) -> list[tuple[list[int], int]]:
    whole, length = encode_pair(tokenizer, "", text, end=False)
    start, tokens = whole[:length], whole[length:]
    room = window - length
    return [(start + tokens[at : at + room], length) for at in range(0, len(tokens), room)]


def _rows(path: Path, content: str) -> list[tuple[str | None, str]]:
    return [_row(line, f"line {number} of {path}") for number, line in numbered(content)]


def _row(line: str, where: str) -> tuple[str | None, str]:
    try:
        row: Any = parsed(line)
    except ValueError as error:
        raise EvaluationError(
            f"{where} is no JSON ({error}): give JSON Lines, or a file that ends in .txt"
        ) from None
    values: dict[str, object] = row if isinstance(row, dict) else {}  # pyright: ignore[reportUnknownVariableType]
    text, prompt = values.get("text"), values.get("prompt")
    response = values.get("response", values.get("answer"))
    if isinstance(text, str):
        return None, text
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    raise EvaluationError(f"{where} has no prompt and response, nor a text: give rows that have")
