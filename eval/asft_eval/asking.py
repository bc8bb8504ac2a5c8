"""Asking a backend what is still open of a part: every answer is written down soon after it is there, and the time left is said."""

from __future__ import annotations

import logging
import threading
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
"""How often what has come is written down, whether or not the backend says a word: a batch's answers come together, and the next ones perhaps minutes later."""


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
    ended = threading.Event()
    writer = threading.Thread(target=answers.write_until, args=(ended,), name="answers", daemon=True)
    writer.start()
    try:
        if part.suite.choices:
            engine.choice_logprobs(prompts, part.suite.choices, done=answers.chosen)
        else:
            seeds = [request.seed for request in requests] if part.protocol.temperature > 0 else []
            engine.generate(prompts, protocol=part.protocol, seeds=seeds, done=answers.written)
    finally:
        ended.set()
        writer.join()
        answers.write()


class _Answers:
    """What has come and is not yet in the journal. One thread adds, another one writes."""

    def __init__(self, part: Part, requests: Sequence[Request], journal: Journal):
        self._part, self._requests, self._journal = part, requests, journal
        self._started = self._wrote = self._said = time.perf_counter()
        self._done = 0
        self._waiting: list[tuple[Request, Completion, list[float]]] = []
        self._guard = threading.Lock()
        self._failed: OSError | ValueError | None = None

    def written(self, place: int, completion: Completion) -> None:
        """A completion."""
        self._add(place, completion, [])

    def chosen(self, place: int, logprobs: list[float]) -> None:
        """Log probabilities of the choices; the first of the most probable ones is the answer."""
        require_numbers(logprobs, "the model")
        best = max(range(len(logprobs)), key=logprobs.__getitem__)
        self._add(place, Completion(self._part.suite.choices[best], 0, True), logprobs)

    def _add(self, place: int, completion: Completion, logprobs: list[float]) -> None:
        with self._guard:
            self._waiting.append((self._requests[place], completion, logprobs))
            self._done += 1
        if self._failed is not None:  # rather than ask on for hours
            raise self._failed
        now = time.perf_counter()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(now)

    def write_until(self, ended: threading.Event) -> None:
        """Writes down what waits, again and again; the first failure is kept for the thread that asks."""
        while not ended.wait(_SECONDS_UNWRITTEN):
            try:
                self.write()
            except (OSError, ValueError) as error:  # ValueError: a text that no file can hold
                self._failed = error
                return

    def write(self) -> None:
        """Writes down what waits; the seconds since the last time are shared among it."""
        with self._guard:
            if not self._waiting:
                return
            now = time.perf_counter()
            seconds = (now - self._wrote) / len(self._waiting)
            rows: list[dict[str, Any]] = [
                request.row(text, seconds, row) for request, text, row in self._waiting
            ]
            self._journal.add(rows)
            self._wrote = now
            self._waiting.clear()

    def _say(self, now: float) -> None:
        done, everything = self._done, len(self._requests)
        if done < everything:
            left = (now - self._started) / done * (everything - done)
            log.info("%s: %d of %d requests, about %.0f s to go", self._part.name, done, everything, left)
