"""Graders: what a model wrote and the example it answers in, a `Score` each out. One row a grader.

A grader that judges one completion by itself is a row of `GRADERS`; one that judges many at once, because it starts
processes, is a row of `BATCH_GRADERS`. Everything heavy is imported by the grader that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType

from asft_eval.errors import EvaluationError
from asft_eval.graders.exact import choice, exact_match
from asft_eval.types import Example, Score

Grader = Callable[[str, str], Score]
"""`grader(completion_text, answer) -> Score`."""

BatchGrader = Callable[[Sequence[tuple[Example, str]]], list[Score]]
"""`grader([(example, completion_text)]) -> [Score]`, in the order of the pairs."""


def _math(pairs: Sequence[tuple[Example, str]]) -> list[Score]:
    from asft_eval.graders.math_pool import grade_math

    return grade_math([(example.answer, text) for example, text in pairs])


def _code(pairs: Sequence[tuple[Example, str]]) -> list[Score]:
    from asft_eval.graders.code import grade_code

    return grade_code(pairs)


GRADERS: Mapping[str, Grader] = MappingProxyType({"exact_match": exact_match, "choice": choice})
BATCH_GRADERS: Mapping[str, BatchGrader] = MappingProxyType({"math": _math, "code": _code})

JUDGED = "judge"
"""In place of a grader: no rule decides, but a judge that is asked later (`asft_eval.judge`)."""

CODE_FLAG = "--allow-code-execution"


def require_permission(suite: str, grader_name: str, *, allowed: bool) -> None:
    """Refuse, before anything is asked, a suite whose grader runs what the model wrote, unless that was allowed.

    Raises:
        EvaluationError: it was not.
    """
    if grader_name == "code" and not allowed:
        raise EvaluationError(
            f"suite {suite} runs programs that the model wrote: add {CODE_FLAG} to run them in the sandbox"
        )


def require_library(suite: str, grader_name: str) -> None:
    """Refuse, before anything is asked, a suite whose grader is not installed; vLLM's image brings none.

    Raises:
        EvaluationError: it is not.
    """
    if grader_name == "math" and find_spec("math_verify") is None:
        raise EvaluationError(
            f"suite {suite} is graded by math-verify, which this Python lacks: pip install 'math-verify[antlr4_9_3]'"
        )


def grader(name: str) -> Grader:
    """The grader of single completions of that name.

    Raises:
        EvaluationError: there is none; the message lists the known ones.
    """
    try:
        return GRADERS[name]
    except KeyError:
        known = ", ".join(sorted([*GRADERS, *BATCH_GRADERS]))
        raise EvaluationError(f"there is no grader {name!r}: choose one of {known}") from None


def grade(
    name: str, pairs: Sequence[tuple[Example, str]], *, allow_code_execution: bool = False
) -> list[Score]:
    """The verdicts of the grader of that name on (example, completion) pairs, in their order.

    Args:
        name: of the grader.
        pairs: examples and what the model wrote.
        allow_code_execution: whether the grader may run programs that the model wrote, in a sandbox.

    Raises:
        EvaluationError: there is no such grader, what it needs is missing, or it is not allowed.
    """
    require_permission("with code", name, allowed=allow_code_execution)
    if name in BATCH_GRADERS:
        return BATCH_GRADERS[name](pairs)
    judge = grader(name)
    return [judge(text, example.answer) for example, text in pairs]


__all__ = [
    "BATCH_GRADERS",
    "CODE_FLAG",
    "GRADERS",
    "JUDGED",
    "BatchGrader",
    "Grader",
    "grade",
    "grader",
    "require_library",
    "require_permission",
]
