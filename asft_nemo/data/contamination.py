"""Finds the questions of evaluation suites in training data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from asft_nemo.data.sources import BadRow, Record

GRAM = 13  # words; the length GPT-3's authors looked for (Brown et al. 2020, appendix C)
PART = 5  # words that a line or a paragraph must have to be taken for a question by itself, where nothing says that it is one
_WORD = re.compile(r"\w+")
_LABEL = re.compile(
    r"\s*(?:question|problem|exercise|task|prompt|instruction|input|q)\s*[:.)]", re.IGNORECASE
)


class Contaminated(NamedTuple):
    """A training row that holds an evaluation question."""

    file: str
    line: int
    suite: str
    row: int  # of the suite, 1 for the first
    why: str

    @property
    def what(self) -> str:
        """What the row holds."""
        return f"{self.why} row {self.row} of {self.suite}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def normalised(text: str) -> list[str]:
    """The words of a text: compatibility forms unified, lower case, punctuation and spaces dropped."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class EvaluationIndex:
    """Questions by their words and by every run of 13 words in them.

    Args:
        suites: name -> questions.
    """

    def __init__(self, suites: Mapping[str, Iterable[str]]):
        self._whole: dict[str, tuple[str, int]] = {}
        self._grams: dict[str, tuple[str, int]] = {}
        for suite, questions in suites.items():
            for row, question in enumerate(questions, start=1):
                words = normalised(question)
                if words:
                    self._whole.setdefault(" ".join(words), (suite, row))
                for gram in _grams(words):
                    self._grams.setdefault(gram, (suite, row))

    def find(self, text: str) -> tuple[str, int, str] | None:
        """Suite, row and what was found; None where the text is no question and shares no 13 words in a row with one."""
        words = normalised(text)
        whole = self._whole.get(" ".join(words)) if words else None
        if whole is not None:
            return (*whole, "is")
        for gram in _grams(words):
            if gram in self._grams:
                return (*self._grams[gram], f"shares {GRAM} words in a row with")
        return None

    def find_part(self, text: str) -> tuple[str, int, str] | None:
        """The same for a question that is a line or a paragraph of its own, as in `Question: ...` above the options; short ones too."""
        for part in _parts(text):
            if part in self._whole:
                return (*self._whole[part], "has a line that is")
        return None


def contaminated(records: Iterable[Record | BadRow], index: EvaluationIndex) -> Iterator[Contaminated]:
    """Rows of which any message holds an evaluation question; bad rows are passed over."""
    for record in records:
        found = None if isinstance(record, BadRow) else found_in(record, index)
        if found is not None:
            yield found


def found_in(record: Record, index: EvaluationIndex) -> Contaminated | None:
    """The evaluation question that a message of the row holds, None where none does."""
    for message in record.conversation.messages:
        content = message["content"]
        if not isinstance(content, str):
            continue
        found = index.find(content)
        if found is None and message["role"] != "assistant":
            found = index.find_part(content)
        if found is not None:
            suite, row, why = found
            return Contaminated(record.file, record.line, suite, row, why)
    return None


def _grams(words: list[str]) -> Iterator[str]:
    for start in range(len(words) - GRAM + 1):
        yield " ".join(words[start : start + GRAM])


def _parts(text: str) -> Iterator[str]:
    """The words of every line and of every paragraph, without a label in front of it."""
    for part in {*text.splitlines(), *re.split(r"\n\s*\n", text)}:
        label = _LABEL.match(part)
        words = normalised(part[label.end() :] if label else part)
        if len(words) >= (1 if label else PART):
            yield " ".join(words)
