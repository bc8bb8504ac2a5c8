"""What evaluation suites ask: the questions alone, for finding them in training data."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError

DATA_DIR_VARIABLE = "ASFT_DATA_DIR"
#: suite -> its file in the folder that ASFT_DATA_DIR names, and the field of the question
QUESTIONS: dict[str, tuple[str, str]] = {
    "math500": ("math/math500_test.jsonl", "problem"),
    "gsm8k": ("math/gsm8k_test.jsonl", "question"),
    "aime24": ("math/aime24_test.jsonl", "problem"),
    "medqa": ("medical/medqa_test.jsonl", "question"),
    "medmcqa": ("medical/medmcqa_test.jsonl", "question"),
    "mmlu_medical": ("medical/mmlu_medical_test.jsonl", "question"),
    "humaneval": ("code/HumanEval.jsonl.gz", "prompt"),
    "alpaca_eval": ("instruct/alpaca_eval.json", "instruction"),
}


def questions(suite: str) -> list[str]:
    """Returns the questions of a suite, in its order.

    Args:
        suite: a name of `QUESTIONS`, or a JSON Lines file with a `prompt` field.

    Raises:
        EvaluationError: there is no such suite or file, or it holds something else.
    """
    if suite in QUESTIONS:
        relative, field = QUESTIONS[suite]
        folder = os.environ.get(DATA_DIR_VARIABLE)
        if not folder:
            raise EvaluationError(
                f"suite {suite} is looked for in the folder that {DATA_DIR_VARIABLE} names: set it, or give a JSON Lines file"
            )
        file = Path(folder) / relative
    else:
        file, field = Path(suite), "prompt"
    if not file.is_file():
        known = ", ".join(QUESTIONS)
        raise EvaluationError(
            f"there is no suite {suite} ({file} is missing): give a JSON Lines file or one of {known}"
        )
    try:
        found = [row[field] for row in _rows(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file} has a row without the text '{field}' ({error!r}): correct the file"
        ) from error
    if not found or not all(isinstance(text, str) for text in found):
        raise EvaluationError(f"{file} has a row without the text '{field}': correct the file")
    return found


def _rows(file: Path) -> list[Any]:
    raw = file.read_bytes()
    text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    if file.name.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]
