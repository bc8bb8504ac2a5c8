"""Named stages: which one runs, how long it took, and about how long the rest will take."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def watched(metrics: Mapping[str, Path], *, steps: int) -> Iterator[None]:
    """Says when each training run is through its steps and about how long the rest will take, while the block runs.

    The ranks show the steps of the run they are at; this is the view over all runs.

    Args:
        metrics: run -> its metrics.jsonl, in the order of the runs.
        steps: of every run.
    """
    stop = threading.Event()
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # of the ranks' bar, which is drawn again below

    def watch() -> None:
        seen: list[tuple[float, str]] = []
        started = time.perf_counter()
        while not stop.wait(0.5):
            for name, path in metrics.items():
                if name not in (done for _, done in seen) and _lines(path) >= steps:
                    seen.append((time.perf_counter() - started, name))
                    ahead, rest = len(metrics) - len(seen), ""
                    if ahead and len(seen) > 1:  # the first run's time contains the start of the ranks
                        left = ahead * (seen[-1][0] - seen[0][0]) / (len(seen) - 1)
                        rest = f", about {duration(left)} of fine-tuning left"
                    logger.info("%s%s is trained (%d of %d)%s", clear, name, len(seen), len(metrics), rest)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def duration(seconds: float) -> str:
    """Seconds in words, rounded as an estimate deserves."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} min"
