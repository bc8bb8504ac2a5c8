"""Graders that need no more than the text: exact match, the letter of a choice, and whether there is an answer at all."""

from __future__ import annotations

from asft_eval.types import Score


def exact_match(completion: str, answer: str) -> Score:
    """Correct where completion and answer are the same text after stripping white space at both ends."""
    parsed = completion.strip()
    if not parsed:
        return Score(False, parsed, "empty completion")
    correct = parsed == answer.strip()
    return Score(correct, parsed, "equal" if correct else "different")


def choice(completion: str, answer: str) -> Score:
    """Correct where the most probable choice, which the run writes as the completion, is the answer's letter."""
    parsed, right = completion.strip(), answer.strip()
    words = f"{parsed or 'nothing'} is the most probable choice"
    return Score(
        parsed == right, parsed, f"{words} and right" if parsed == right else f"{words}, right is {right}"
    )
