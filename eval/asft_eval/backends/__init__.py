"""Backends: what runs a model. Three methods define one; a backend loads its model once for all suites.

`choice_logprobs` and `loglikelihood` score given text, `generate` writes new text. Answers come in the order of the
questions whatever the batching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from asft_eval.errors import EvaluationError
from asft_eval.types import Completion
from asft_eval.types import Protocol as EvaluationProtocol


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Log probability (natural) of a continuation: the sum over its `num_tokens` tokens."""

    logprob: float
    num_tokens: int


class Backend(Protocol):
    """What every backend offers. It may also have `requests_at_once: int`, the requests after which answers are written down."""

    name: str
    versions: Mapping[str, str]

    def generate(
        self, prompts: Sequence[str], *, protocol: EvaluationProtocol, seeds: Sequence[int] = ()
    ) -> list[Completion]:
        """One completion a prompt; a prompt of which several are wanted comes several times.

        Args:
            prompts: complete, but for the tokens that the tokenizer adds to every text.
            protocol: its temperature, top_p and max_tokens; `n` and `k` are the caller's business.
            seeds: one a prompt where the temperature is above 0, so that a completion depends on nothing beside it.
        """
        ...

    def choice_logprobs(self, prompts: Sequence[str], choices: Sequence[str]) -> list[list[float]]:
        """For every prompt the log probability of each choice as its continuation, in the order of `choices`.

        A choice's tokens are those that the whole text has more than the prompt alone.
        """
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """For every (prompt, continuation) the log probability of the continuation, no end token added."""
        ...


def _hf(model_dir: Path, batch_size: int) -> Backend:
    from asft_eval.backends.hf import HfBackend

    return HfBackend(model_dir, batch_size=batch_size)


BACKENDS: Mapping[str, Callable[[Path, int], Backend]] = MappingProxyType({"hf": _hf})
"""Name -> how to open a model directory with a batch size. Imports happen on opening."""


def open_backend(name: str, model_dir: Path, *, batch_size: int) -> Backend:
    """Load a model directory with the backend of that name.

    Raises:
        EvaluationError: no such backend, or the directory is not a loadable model.
    """
    try:
        opener = BACKENDS[name]
    except KeyError:
        known = ", ".join(sorted(BACKENDS))
        raise EvaluationError(f"there is no backend {name!r}: choose one of {known}") from None
    return opener(model_dir, batch_size)


__all__ = ["BACKENDS", "Backend", "LogLikelihood", "open_backend"]
