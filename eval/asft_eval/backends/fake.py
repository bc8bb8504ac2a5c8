"""A backend without a model: completions come from a function. For tests of everything around a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from asft_eval.backends import LogLikelihood
from asft_eval.types import Completion, Protocol


class FakeBackend:
    """Answers `answer(prompt)`, one character a token; every character has probability 1/2.

    Args:
        answer: the completion for a prompt.
    """

    name = "fake"
    requests_at_once = 1024
    versions: Mapping[str, str] = {}

    def __init__(self, answer: Callable[[str], str]):
        self._answer = answer
        self.asked: list[str] = []
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[str], *, protocol: Protocol, seeds: Sequence[int] = ()
    ) -> list[Completion]:
        """The function's answers, cut to `protocol.max_tokens` characters."""
        self.asked.extend(prompts)
        self.seeds.extend(seeds)
        texts = [self._answer(prompt) for prompt in prompts]
        limit = protocol.max_tokens
        return [Completion(text[:limit], len(text[:limit]), len(text) <= limit) for text in texts]

    def choice_logprobs(self, prompts: Sequence[str], choices: Sequence[str]) -> list[list[float]]:
        """0 for the choice that the function answers, minus infinity for the others."""
        self.asked.extend(prompts)
        answers = [self._answer(prompt) for prompt in prompts]
        return [[0.0 if choice == answer else float("-inf") for choice in choices] for answer in answers]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """`-ln 2` a character."""
        return [LogLikelihood(-0.6931471805599453 * len(text), len(text)) for _, text in pairs]
