"""Asking a backend what is still open of a part: every answer is written down soon after it is there, and the time left is said."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from asft_eval.backends import Backend
from asft_eval.backends.tokens import require_numbers
from asft_eval.requests import Journal, Part, Request
from asft_eval.types import Completion

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_UNWRITTEN = 2.0


def ask(engine: Backend, part: Part, requests: Sequence[Request], journal: Journal) -> None:
    """Asks all requests at once, so that the backend may order and batch them; what is answered when it fails is kept.

    Args:
        engine: an open backend.
        part: a suite under a protocol.
        requests: those of the part without an answer.
        journal: gets the answers.
    """
    if not requests:
        return
    prompts = [request.prompt for request in requests]
    answers = _Answers(part, requests, journal)
    try:
        if part.suite.choices:
            engine.choice_logprobs(prompts, part.suite.choices, done=answers.chosen)
        else:
            seeds = [request.seed for request in requests] if part.protocol.temperature > 0 else []
            engine.generate(prompts, protocol=part.protocol, seeds=seeds, done=answers.written)
    finally:
        answers.write()


class _Answers:
    """What has come and is not yet in the journal."""

    def __init__(self, part: Part, requests: Sequence[Request], journal: Journal):
        self._part, self._requests, self._journal = part, requests, journal
        self._started = self._wrote = self._said = time.perf_counter()
        self._done = 0
        self._waiting: list[tuple[Request, Completion, list[float]]] = []

    def written(self, place: int, completion: Completion) -> None:
        """A completion."""
        self._add(place, completion, [])

    def chosen(self, place: int, logprobs: list[float]) -> None:
        """Log probabilities of the choices; the first of the most probable ones is the answer."""
        require_numbers(logprobs, "the model")
        best = max(range(len(logprobs)), key=logprobs.__getitem__)
        self._add(place, Completion(self._part.suite.choices[best], 0, True), logprobs)

    def _add(self, place: int, completion: Completion, logprobs: list[float]) -> None:
        self._waiting.append((self._requests[place], completion, logprobs))
        now = time.perf_counter()
        if now - self._wrote >= _SECONDS_UNWRITTEN:
            self.write()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(now)

    def write(self) -> None:
        """Writes down what waits; the seconds since the last time are shared among it."""
        now = time.perf_counter()
        seconds = (now - self._wrote) / max(len(self._waiting), 1)
        rows: list[dict[str, Any]] = [request.row(text, seconds, row) for request, text, row in self._waiting]
        if rows:
            self._journal.add(rows)
        self._wrote = now
        self._done += len(rows)
        self._waiting.clear()

    def _say(self, now: float) -> None:
        done, everything = self._done + len(self._waiting), len(self._requests)
        if done < everything:
            left = (now - self._started) / done * (everything - done)
            log.info("%s: %d of %d requests, about %.0f s to go", self._part.name, done, everything, left)
