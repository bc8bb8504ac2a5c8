"""Answers as text: where a completion states one, and one spelling for the many ways of writing the same.

Nothing here computes; `math_judge` does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TAIL = 4000
"""Characters of a completion's end in which an unboxed answer is looked for: texts of 1 MB must cost no more than others."""

_BOXES = 50
"""Only the last so many boxes are looked at, for the same reason."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and|or|und)?[\s$,;\\(\[]*", re.IGNORECASE)
_MARKED = re.compile(r"####\s*([^\s#][^\n]*?)(?=####|\n|$)")
_HEADING = re.compile(r"\**(?:[A-Za-z]{2,}|\d{1,2}[.)]\s+[A-Za-z])")
_STATED = re.compile(
    r"(?:final\s+)?answer\s*(?:\*\*)?\s*(?:is|:|=)\s*(?:\*\*)?\s*:?\s*(?=(.+))", re.IGNORECASE
)
_LATEX = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?%?")
_SENTENCE_END = re.compile(r"(?<=[^\d\s])\.(?:\s|$)|\.(?:\s+[A-Z]|\s*$)|\n")


class Found(NamedTuple):
    """An answer and where it stood.

    Attributes:
        text: the answer; empty = there is none.
        where: in a few words, for the reason.
    """

    text: str
    where: str


def find_answer(completion: str) -> Found:
    r"""What a completion states as its answer.

    In this order: its last `\boxed{}` (boxes with only `and`, `or` or a comma between them are one answer), what follows the last `####`
    (a heading of Markdown comes after the next one), what follows the last "answer is" or "answer:", its last formula, its last number.
    """
    if not completion.strip():
        return Found("", "empty completion")
    boxed = last_boxed(completion)
    if boxed is not None:
        return Found(boxed, "last box")
    tail = completion[-_TAIL:]
    marked = list(_MARKED.finditer(tail))
    answers = [one for one in marked if not _heading(one, tail)]
    if answers:
        return Found(answers[-1][1].strip(), "after ####")
    stated = list(_STATED.finditer(tail))
    if stated:
        return Found(_first_formula_or_sentence(stated[-1][1]), "after 'answer'")
    if marked:
        return Found(marked[-1][1].strip(), "after ####")
    formulas = list(_LATEX.finditer(tail))
    if formulas:
        return Found(_content(formulas[-1]), "last formula")
    numbers = [match[0] for match in _NUMBER.finditer(tail) if any(c.isdigit() for c in match[0])]
    if numbers:
        return Found(numbers[-1], "last number")
    short = completion.strip()
    return Found(short, "whole text") if len(short) <= 40 else Found("", "no answer found")


def _heading(marked: re.Match[str], text: str) -> bool:
    """Whether `#### Step 2` is a heading of Markdown: words, and text below."""
    return _HEADING.match(marked[1]) is not None and bool(text[marked.end() :].strip())


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed, non-empty `\boxed{}`, joined by commas with boxes right before it; None where there is none."""
    boxes: list[tuple[int, int, str]] = []
    for match in reversed(list(_BOX.finditer(text))[-_BOXES:]):
        end = _closing(text, match.end())
        content = text[match.end() : end].strip() if end is not None else ""
        if end is None or not content:
            continue
        if boxes and not _BETWEEN_BOXES.fullmatch(text, end + 1, boxes[0][0]):
            break
        if boxes and end > boxes[0][0]:  # the box around the box that was found
            break
        boxes.insert(0, (match.start(), end, content))
    if not boxes:
        return None
    return ", ".join(dict.fromkeys(content for _, _, content in boxes))


def _closing(text: str, start: int) -> int | None:
    depth = 1
    # An answer is short; an unclosed box in a long text must not make the search quadratic.
    for place in range(start, min(len(text), start + _TAIL)):
        if text[place] == "\\":
            continue
        escaped = place > 0 and text[place - 1] == "\\"
        if text[place] == "{" and not escaped:
            depth += 1
        elif text[place] == "}" and not escaped:
            depth -= 1
            if depth == 0:
                return place
    return None


def _first_formula_or_sentence(text: str) -> str:
    match = _LATEX.search(text)
    if match and not re.search(r"[A-Za-z]{3,}|\d", text[: match.start()]):
        return _content(match)
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip().strip("*").rstrip(".").strip()


def _content(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


# --- one spelling --------------------------------------------------------------------------------------------

_PLAIN = (
    ("−", "-"), ("–", "-"), ("×", r"\times "), ("·", r"\cdot "), ("π", r"\pi "), ("∞", r"\infty "), (r"\varnothing", r"\emptyset"), ("√", r"\sqrt "),
    ("≤", r"\le "), ("≥", r"\ge "), ("∪", r"\cup "), ("°", r"^\circ "), ("\u00a0", " "), ("\u202f", " "),
    (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\leq", r"\le"), (r"\geq", r"\ge"),
    (r"\left", ""), (r"\right", ""), ("~", " "),
    (r"\qquad", " "), (r"\quad", " "), (r"\displaystyle", ""), (r"\$", ""), ("$", ""), (r"\%", "%"), ("{,}", ","),
    ("€", ""), ("£", ""), (r"\lbrace", r"\{"), (r"\rbrace", r"\}"), (r"\degree", r"^\circ "), (r"\operatorname", r"\text"),
    (r"\textbf", r"\text"), (r"\textit", r"\text"), (r"\mathrm", r"\text"), (r"\mathbf", r"\text"), (r"\mbox", r"\text"),
    (r"\mathit", r"\text"), (r"\textrm", r"\text"), (r"\rm", ""), (r"\bigl", ""), (r"\bigr", ""), (r"\big", ""), (r"\Big", ""),
    ("**", "\x00"), ("\x00", "^") ,
)  # fmt: skip
_SPACE = re.compile(r"(?<!\\)\\[,;: ]")  # not the end of a matrix' row
_ROW_GAP = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|cm|mm|em|ex|in)\s*\]")
_NARROW = re.compile(r"(?<!\\)\\!\s*")
_MATRIX = re.compile(r"\\(begin|end)\s*\{[bB]matrix\}")
_BARE_MATRIX = re.compile(r"[\[(]\s*\\begin\{matrix\}(.*?)\\end\{matrix\}\s*[\])]", re.DOTALL)
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*")
_FRAC_DIGITS = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)")
_FRAC_MIXED = re.compile(r"\\frac\s*(\d)\s*\{|\\frac\s*(\{[^{}]*\})\s*(\d)")
_SQRT_DIGIT = re.compile(r"\\sqrt\s*(\d|[a-z])")
_THOUSANDS = re.compile(r"(?<![\d,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_BRACKET = re.compile(r"[(\[]|\\\{|[)\]]|\\\}")
_SEPARATED = re.compile(r",\s|;")
_LEADING_POINT = re.compile(r"(?<![\d.])\.(\d)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*\d[^{}]*)\}")
_ASSIGNED = re.compile(r"^\s*(?:[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?\s*(?:=|\\in\b))\s*(?=\S)")
_TRAILING = re.compile(r"[\s.,;:]+$")


def tidy(text: str) -> str:
    """An answer in one spelling that is still LaTeX: what `same_text` compares and math-verify parses."""
    text = text.strip().strip("*").strip()
    text = _NARROW.sub("", _SPACE.sub(" ", text))
    for old, new in _PLAIN:
        text = text.replace(old, new)
    text = _ROW_GAP.sub(r"\\\\", text)
    text = _MATRIX.sub(r"\\\1{pmatrix}", text)
    text = _BARE_MATRIX.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = _DEGREES.sub(" ", text)
    text = _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", text)
    text = _FRAC_MIXED.sub(_braced, text)
    text = _SQRT_DIGIT.sub(r"\\sqrt{\1}", text)
    text = _LEADING_POINT.sub(r"0.\1", text)
    text = _TRAILING.sub("", text).strip()
    whole = _WHOLE_TEXT.fullmatch(text)
    return whole[1].strip() if whole else text


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1]}}}{{" if match[1] else rf"\frac{match[2]}{{{match[3]}}}"


def without_assignment(text: str) -> str:
    """`x = 5` as `5`, `f(x) = x + 1` as `x + 1`, `x \\in [0, 1]` as `[0, 1]`; an equation with more signs stays."""
    return _ASSIGNED.sub("", text) if text.count("=") + text.count(r"\in") <= 1 else text


def without_thousands(text: str) -> str:
    """`1,234` as `1234`; not `(1,234)`, which is a pair, while in `(1,234, 5)` other commas part and in `(1,000)` no number begins with 0."""

    def joined(match: re.Match[str]) -> str:
        inside = _innermost(text, match.start())
        number = inside is None or ",0" in match[0] or _SEPARATED.search(inside) is not None
        return match[0].replace(",", "") if number else match[0]

    return _THOUSANDS.sub(joined, text)


def _innermost(text: str, place: int) -> str | None:
    """What stands in the round, square or set brackets around a place; None where there are none."""
    opened: list[int] = []
    for bracket in _BRACKET.finditer(text):
        if bracket[0] in ("(", "[", r"\{"):
            opened.append(bracket.end())
        elif opened:
            start = opened.pop()
            if start <= place < bracket.start():
                return text[start : bracket.start()]
    return None


def words_only(text: str) -> str:
    r"""The text with `\text{}` opened, white space and case gone, and braces around single signs off."""
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    return re.sub(r"[\s\\]+", "", text).lower()
