"""What a user of the evaluation can mend."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class EvaluationError(Exception):
    """A model, suite, backend or result is unusable; the message is one sentence that names the cure."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a sentence about a word that is none of the known ones: the nearest of them, and all."""
    near = difflib.get_close_matches(word, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}choose one of {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """What a library says went wrong, fit to stand within our sentence."""
    return " ".join(str(error).split())[:300].rstrip(".: ") or type(error).__name__
