"""From a row of a published set to a question and its answer. One small function a form of row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

LETTERS = "ABCD"


class Asked(NamedTuple):
    """What a row asks, before any prompt variant.

    Attributes:
        id: the publisher's where there is one, else empty: the row's number from 1 is taken.
        question: the text.
        answer: what the grader compares with.
    """

    id: str
    question: str
    answer: str


Record = Mapping[str, Any]


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The medical form: question, four lettered options, and the word that the letter follows."""
    if len(options) != len(LETTERS):
        raise ValueError(f"{len(options)} options instead of {len(LETTERS)}")
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True)]
    return "\n".join([f"Question: {question}", "", "Options:", *lines, "", "Answer:"])


def math500(row: Record) -> Asked:
    """`problem`, `answer`, `unique_id`."""
    return Asked(row["unique_id"], row["problem"], _answer(row["answer"]))


def gsm8k(row: Record) -> Asked:
    """`question`; the answer stands after `####`."""
    worked, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"no #### in the answer, which ends {worked[-20:]!r}")
    return Asked("", row["question"], answer.strip().replace(",", ""))


def aime24(row: Record) -> Asked:
    """`id`, `problem`, `answer`."""
    return Asked(str(row["id"]), row["problem"], _answer(row["answer"]))


def aime25(row: Record) -> Asked:
    """`problem`, `answer`."""
    return Asked(str(row.get("id", "")), row["problem"], _answer(row["answer"]))


def amc23(row: Record) -> Asked:
    """`id`, `question` (or `problem`), `answer`, which the publisher writes as a float."""
    answer = row["answer"]
    whole = isinstance(answer, float) and answer.is_integer()
    text = str(int(answer)) if whole else _answer(answer)
    return Asked(str(row.get("id", "")), row["question"] if "question" in row else row["problem"], text)


def minerva(row: Record) -> Asked:
    """`problem`, and `solution`, whose last box holds the answer (the Qwen2.5-Math harness' file)."""
    from asft_eval.graders.math_text import last_boxed

    answer = row["answer"] if "answer" in row else last_boxed(row["solution"])
    if answer is None:
        raise ValueError("no \\boxed answer in the solution")
    return Asked(str(row.get("idx", "")), row["problem"], _answer(answer))


def olympiad(row: Record) -> Asked:
    """`question`, `final_answer` (a list of one text), `id`."""
    answers: Any = row["final_answer"]
    if isinstance(answers, list):
        (answers, *_) = cast(list[object], answers)
    return Asked(str(row.get("id", "")), row["question"], _answer(answers))


def medqa(row: Record) -> Asked:
    """`question`, `options` by letter, `answer_idx`."""
    options: Mapping[str, str] = row["options"]
    text = multiple_choice(row["question"], [options[letter] for letter in LETTERS])
    return Asked("", text, _answer(row["answer_idx"]))


def medmcqa(row: Record) -> Asked:
    """`id`, `question`, `opa` to `opd`, `cop` counted from 0."""
    text = multiple_choice(row["question"], [row[f"op{letter}"] for letter in "abcd"])
    return Asked(row["id"], text, LETTERS[_place(row["cop"])])


def mmlu(row: Record) -> Asked:
    """`question`, `choices`, `answer` counted from 0."""
    return Asked("", multiple_choice(row["question"], row["choices"]), LETTERS[_place(row["answer"])])


def alpaca_eval(row: Record) -> Asked:
    """`instruction`, and the reference `output`, which a judge compares with; the id begins with `dataset`."""
    digest = hashlib.sha256(row["instruction"].encode()).hexdigest()
    return Asked(f"{row['dataset']}/{digest[:8]}", row["instruction"], row["output"])


def _answer(answer: object) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer is {json.dumps(answer)}, neither a text nor a number")
    return str(answer)


def _place(place: object) -> int:
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(LETTERS):
        raise ValueError(f"the right option is {place!r}, not 0 to {len(LETTERS) - 1}")
    return place
