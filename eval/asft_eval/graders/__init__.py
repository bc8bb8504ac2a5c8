"""Graders: a completion's text and the right answer in, a `Score` out. One row a grader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from asft_eval.errors import EvaluationError
from asft_eval.graders.exact import exact_match
from asft_eval.types import Score

Grader = Callable[[str, str], Score]
"""`grader(completion_text, answer) -> Score`."""

GRADERS: Mapping[str, Grader] = MappingProxyType({"exact_match": exact_match})


def grader(name: str) -> Grader:
    """The grader of that name.

    Raises:
        EvaluationError: there is none; the message lists the known ones.
    """
    try:
        return GRADERS[name]
    except KeyError:
        raise EvaluationError(
            f"there is no grader {name!r}: choose one of {', '.join(sorted(GRADERS))}"
        ) from None


__all__ = ["GRADERS", "Grader", "grader"]
