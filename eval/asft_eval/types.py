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
        answer: what the grader compares with; a letter for multiple choice, a program that checks it for code.
        question: the text without the prompt variant's words around it; empty where the prompt has none.
    """

    id: str
    prompt: str
    answer: str
    question: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """Versioned examples and the name of the grader that judges them.

    Attributes:
        name: as `--suite` knows it.
        version: changes with the examples' text or the way they are judged.
        grader: a name of `asft_eval.graders`.
        examples: the questions.
        choices: continuations of every prompt whose log probabilities decide, e.g. (" A", " B"); empty = the model writes.
        prompt: the prompt variant (`asft_eval.suites.prompts`) that made the prompts of the questions.
    """

    name: str
    version: str
    grader: str
    examples: tuple[Example, ...]
    choices: tuple[str, ...] = ()
    prompt: str = "raw"

    @property
    def sha256(self) -> str:
        """Hash of every part: equal hashes mean the same questions, asked and judged alike."""
        head = [self.name, self.version, self.grader, list(self.choices), self.prompt]
        rows = [*head, *(asdict(example) for example in self.examples)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def first(self, limit: int | None) -> Suite:
        """The same suite cut to its first `limit` examples; all of them for None."""
        return Suite(self.name, self.version, self.grader, self.examples[:limit], self.choices, self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How completions are drawn. Scores of different protocols are not comparable.

    Attributes:
        name: a name of `asft_eval.protocols`, e.g. "greedy".
        max_tokens: completions are cut after this many tokens, the end token included.
        n: completions of every prompt.
        temperature: 0 = the most probable token.
        top_p: tokens are drawn from the smallest set of this probability.
        seed: of the drawing; None where nothing is drawn.
        k: the score is pass@k; None = the share of right completions.
    """

    name: str = "greedy"
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    k: int | None = None


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
