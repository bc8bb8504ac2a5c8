"""Named stages: which one runs, how long it took, and about how long the rest will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Stages:
    """Says every stage aloud and keeps its seconds.

    What is left is the expected seconds of the stages to come, scaled by how this machine did so far.

    Args:
        expected_seconds: stage name -> seconds on a quiet machine with two cores, in the order of the stages.
    """

    def __init__(self, expected_seconds: Mapping[str, float]):
        self.expected = dict(expected_seconds)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        """One stage, by name; `text` says what it does."""
        number = list(self.expected).index(name) + 1
        left = duration(self.left())
        logger.info("[%d/%d] %s (all that is left: about %s)", number, len(self.expected), text, left)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def left(self) -> float:
        """Seconds that the unfinished stages are expected to take."""
        ahead = sum(seconds for name, seconds in self.expected.items() if name not in self.seconds)
        done = sum(self.expected[name] for name in self.seconds)
        # The first stages take a second or two and say nothing about the machine.
        pace = sum(self.seconds.values()) / done if done > 10 else 1.0
        return ahead * pace


def duration(seconds: float) -> str:
    """Seconds in words, rounded as an estimate deserves."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} min"
