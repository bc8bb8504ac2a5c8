"""Exact match: the completion is the answer, white space at both ends aside."""

from __future__ import annotations

from asft_eval.types import Score


def exact_match(completion: str, answer: str) -> Score:
    """Correct where completion and answer are the same text after stripping white space at both ends."""
    parsed = completion.strip()
    if not parsed:
        return Score(False, parsed, "empty completion")
    correct = parsed == answer.strip()
    return Score(correct, parsed, "equal" if correct else "different")
