"""A backend without a model: completions come from a function. For tests of everything around a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from asft_eval.backends import Done, LogLikelihood, ignore
from asft_eval.types import Completion, Protocol


class FakeBackend:
    """Answers `answer(prompt)`, one character a token; every character has probability 1/2.

    Args:
        answer: the completion for a prompt.
    """

    name = "fake"
    versions: Mapping[str, str] = {}

    def __init__(self, answer: Callable[[str], str]):
        self._answer = answer
        self.asked: list[str] = []
        self.seeds: list[int] = []

    def generate(
        self,
        prompts: Sequence[str],
        *,
        protocol: Protocol,
        seeds: Sequence[int] = (),
        done: Done[Completion] = ignore,
    ) -> list[Completion]:
        """The function's answers, cut to `protocol.max_tokens` characters."""
        self.asked.extend(prompts)
        self.seeds.extend(seeds)
        limit = protocol.max_tokens
        found: list[Completion] = []
        for place, prompt in enumerate(prompts):
            text = self._answer(prompt)
            found.append(Completion(text[:limit], len(text[:limit]), len(text) <= limit))
            done(place, found[place])
        return found

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """0 for the choice that the function answers, minus infinity for the others."""
        self.asked.extend(prompts)
        found: list[list[float]] = []
        for place, prompt in enumerate(prompts):
            answer = self._answer(prompt)
            found.append([0.0 if choice == answer else float("-inf") for choice in choices])
            done(place, found[place])
        return found

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """`-ln 2` a character."""
        return [LogLikelihood(-0.6931471805599453 * len(text), len(text)) for _, text in pairs]
