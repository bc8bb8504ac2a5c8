"""Is a completion's answer the right one? Plain text and exact numbers first, then math-verify, then its parts one by one.

Every verdict says which step decided. Nothing here limits time: `math_pool` runs it where it can be stopped.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from asft_eval.graders.math_text import find_answer, tidy, without_assignment, without_thousands, words_only
from asft_eval.graders.math_units import split_unit
from asft_eval.types import Score

LONGEST = 400
"""Characters; what is longer is no answer that needs algebra, and parsing it could take minutes."""

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")
_RATIO = re.compile(r"([-+]?)\s*(?:\\frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))")
_SCIENTIFIC = re.compile(
    r"([-+]?\d+(?:\.\d+)?)\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?|[eE]([-+]?\d{1,3}))"
)
_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_CLOSE_ENOUGH = Fraction(1, 10**6)

Verdict = tuple[bool, str]


def judge(gold: str, completion: str) -> Score:
    """The verdict on a completion, with the step that decided."""
    found = find_answer(completion)
    if not found.text:
        return Score(False, "", found.where)
    correct, why = same(gold, found.text)
    return Score(correct, found.text[:LONGEST], f"{found.where}: {why}")


def same(gold: str, answer: str) -> Verdict:
    """Whether two answers are equal, and by which step."""
    verdict = quick(gold, answer)
    if verdict is not None:
        return verdict
    gold, answer, _, _ = _bare(gold, answer)
    return _parts(gold, answer) or _algebra(gold, answer) or (False, "different")


def quick(gold: str, answer: str) -> Verdict | None:
    """The verdict where it takes no algebra; None where it does. Takes well under a millisecond."""
    if len(answer) > LONGEST:
        return False, f"an answer of {len(answer)} characters is none"
    if words_only(tidy(gold)) == words_only(tidy(answer)):
        return True, "the same text"
    gold, answer, gold_unit, unit = _bare(gold, answer)
    if gold_unit and unit and gold_unit != unit:
        return False, f"in {unit} instead of {gold_unit}"
    return _text(gold, answer) or _numbers(gold, answer) or _letter(gold, answer) or _base(gold, answer)


def _bare(gold: str, answer: str) -> tuple[str, str, str, str]:
    """Both without names and units, and their units; two equations stay as they are."""
    gold, answer = tidy(gold), tidy(answer)
    if _equations(gold, answer):
        return gold, answer, "", ""
    gold = without_assignment(gold)
    if "=" not in gold:  # an equation is compared with an equation
        answer = without_assignment(answer)
    (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
    return gold, answer, gold_unit, unit


def _equations(gold: str, answer: str) -> bool:
    """Whether `y = 2x` is answered by an equation in another form (`2x - y = 0`, `x = y/2`), not by `y = ...` or a value alone."""
    if gold.count("=") != 1 or answer.count("=") != 1:
        return False
    value, rest = without_assignment(gold), without_assignment(answer)
    if not _VARIABLE.search(value):  # of `x = 5` the 5 is asked for, and `2x = 10` does not say it
        return False
    return "=" in rest or gold.partition("=")[0].strip() in _VARIABLE.findall(rest)


def _text(gold: str, answer: str) -> Verdict | None:
    if words_only(without_thousands(gold)) == words_only(without_thousands(answer)):
        return True, "the same text but for unit, name or thousands"
    return None


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""A plain number's exact value and whether it has a percent sign: `-1,234.5`, `3/4`, `\frac{3}{4}`, `2\frac{1}{3}`, `2 \times 10^{-3}`."""
    text = without_thousands(text).strip()
    percent = text.endswith("%")
    text = text.rstrip("% ").strip()
    if _NUMBER.fullmatch(text):
        return Fraction(text.rstrip(".")), percent
    if (match := _RATIO.fullmatch(text)) is not None:
        top, bottom = int(match[2] or match[4]), int(match[3] or match[5])
        return (Fraction(top, bottom) * (-1 if match[1] == "-" else 1), percent) if bottom else None
    if (match := _MIXED.fullmatch(text)) is not None:
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        if not bottom:
            return None
        return (int(match[2]) + Fraction(top, bottom)) * (-1 if match[1] == "-" else 1), percent
    if (match := _SCIENTIFIC.fullmatch(text)) is not None:
        return Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3]), percent
    return None


def _numbers(gold: str, answer: str) -> Verdict | None:
    right, given = number(gold), number(answer)
    if right is None or given is None:
        return None
    (a, a_percent), (b, b_percent) = right, given
    if _close(a, b):
        return True, "the same number"
    if a_percent != b_percent and _close(a / (100 if a_percent else 1), b / (100 if b_percent else 1)):
        return True, "the same number, once in per cent"
    return False, "another number"


def _close(gold: Fraction, given: Fraction) -> bool:
    """Equal, or nearly where one of them is no whole number and may have been rounded; a whole gold was not, whatever its size."""
    if gold.denominator == given.denominator == 1:
        return gold == given
    scale = 1 if gold.denominator == 1 else max(abs(gold), abs(given))
    return abs(gold - given) <= _CLOSE_ENOUGH * scale


def _letter(gold: str, answer: str) -> Verdict | None:
    """A gold answer that is one letter of a choice."""
    right = re.fullmatch(r"\(?([A-E])\)?", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", gold).strip())
    if right is None:
        return None
    given = re.match(r"\(?([A-E])\)?(?![A-Za-z])", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip())
    if given is None:
        return None
    return (True, "the same letter") if given[1] == right[1] else (False, "another letter")


def _base(gold: str, answer: str) -> Verdict | None:
    """A gold number written in a base, as `4210_{5}`; the base may be left out, as the question names it."""
    right = _BASE.fullmatch(gold)
    if right is None or not right[1][0].isdigit():
        return None
    given = _BASE.fullmatch(answer)
    if (given[1] if given else answer.strip()) != right[1]:
        return False, "other digits"
    return (False, "another base") if given and given[2] != right[2] else (True, "the same digits")


# --- lists, tuples, intervals, sets --------------------------------------------------------------------------


def _parts(gold: str, answer: str) -> Verdict | None:
    right, given = _split(gold), _split(answer)
    if right is None or given is None:
        return None
    (kind, golds), (other, answers) = right, given
    if len(golds) != len(answers):
        return False, f"{len(answers)} parts instead of {len(golds)}"
    if (kind in _ORDERED) != (other in _ORDERED):
        # A list without brackets may stand for a set or, in its order, for a tuple; a set is no tuple.
        if "" not in (kind, other):
            return False, f"brackets {other} instead of {kind}"
    elif kind in _ORDERED and kind != other:
        return False, f"brackets {other} instead of {kind}"
    if kind in _ORDERED or other in _ORDERED:
        equal = all(same(a, b)[0] for a, b in zip(golds, answers, strict=True))
        return (True, "part by part in order") if equal else (False, "a part differs")
    return (True, "part by part in any order") if _matched(golds, answers) else (False, "a part differs")


_ORDERED = ("()", "[]", "(]", "[)")


def _matched(golds: Sequence[str], answers: Sequence[str]) -> bool:
    left = list(answers)
    for one in golds:
        place = next((i for i, other in enumerate(left) if same(one, other)[0]), None)
        if place is None:
            return False
        del left[place]
    return True


def _split(text: str) -> tuple[str, list[str]] | None:
    r"""Kind of brackets and parts of `(a, b)`, `[a, b)`, `\{a, b\}` or `a, b`; None for anything else."""
    text = without_thousands(text).strip()
    text = re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}|\s(?:and|or)\s", ",", text)
    kind, inner = "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        kind, inner = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _encloses(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    parts = _at_commas(inner)
    if parts is None or (len(parts) < 2 and kind != "{}") or not all(parts):
        return None
    return kind, parts


def _encloses(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0:
            return place == len(text) - 1
    return False


def _at_commas(text: str) -> list[str] | None:
    depth, parts, start = 0, list[str](), 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None
        if sign in ",;" and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [part for part in [*parts, last] if part] if depth == 0 else None


# --- math-verify ---------------------------------------------------------------------------------------------


def _algebra(gold: str, answer: str) -> Verdict | None:
    parse, verify = _math_verify()
    right, given = parse(gold), parse(answer)
    if not right or not given:
        return None
    if verify(right, given):
        return True, "equal by math-verify"
    if _same_equation(right[0], given[0]):
        return True, "equations whose sides differ by a factor"
    return False, "not equal by math-verify"


def _same_equation(right: Any, given: Any) -> bool:
    """Whether two equations say the same: (left - right) of one is a constant multiple of the other's."""
    sympy: Any = importlib.import_module("sympy")
    kind = sympy.Eq
    if not (isinstance(right, kind) and isinstance(given, kind)):
        return False
    a, b = right.lhs - right.rhs, given.lhs - given.rhs
    ratio = sympy.simplify(a / b) if b != 0 else sympy.Integer(0)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


@functools.cache
def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
    """math-verify's two functions without their alarms, which work in the main thread of a process alone."""
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    for name in (
        "math_verify.parser",
        "math_verify.grader",
    ):  # they warn that time is not limited: it is, outside
        logging.getLogger(name).setLevel(logging.ERROR)
    library: Any = math_verify
    kinds = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]

    def parse(text: str) -> list[Any]:
        return library.parse(f"${without_thousands(text)}$", kinds, parsing_timeout=None)

    def verify(right: list[Any], given: list[Any]) -> bool:
        # 1 < x < 3 answers (1, 3)
        return bool(library.verify(right, given, allow_set_relation_comp=True, timeout_seconds=None))

    return parse, verify
