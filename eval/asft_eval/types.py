"""The words of the evaluation: suite, example, protocol, completion, score. Plain immutable values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a suite.

    Attributes:
        id: unique within the suite.
        prompt: the text the model is given, already rendered.
        answer: what the grader compares with.
    """

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Versioned examples and the name of the grader that judges them."""

    name: str
    version: str
    grader: str
    examples: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        """Hash of name, version, grader and every example: equal hashes mean the same questions, judged alike."""
        rows = [self.name, self.version, self.grader, *(asdict(example) for example in self.examples)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def first(self, limit: int | None) -> Suite:
        """The same suite cut to its first `limit` examples; all of them for None."""
        return Suite(self.name, self.version, self.grader, self.examples[:limit])


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How completions are drawn. Scores of different protocols are not comparable.

    Attributes:
        name: e.g. "greedy".
        max_tokens: completions are cut after this many tokens, the end token included.
    """

    name: str = "greedy"
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote.

    Attributes:
        text: without prompt and special tokens.
        num_tokens: generated tokens, the end token included.
        finished: False where `max_tokens` cut it.
    """

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Score:
    """A grader's verdict on one completion.

    Attributes:
        correct: the verdict.
        parsed: the answer that the grader read out of the completion.
        reason: why, in a few words, for a reader of `samples.jsonl`.
    """

    correct: bool
    parsed: str
    reason: str
