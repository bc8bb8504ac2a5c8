"""Shows how far a run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SHOWN = ("loss", "nll", "kl", "kl_reverse")
_RECENT = 20  # steps whose median is the pace: one with a validation or a checkpoint in it is not
_LINES = 10  # of a run at least: a short one has no minute between them
_SECONDS = 60.0  # between lines at most: a long run's log stays readable, and shows within a minute that the run lives


class Progress:
    """The bar of a run, moved by every step; without a terminal a line every tenth of the run, and every minute.

    Args:
        description: shown in front.
        done: steps before this start of the run.
        steps: of the whole run.
    """

    def __init__(self, description: str, *, done: int, steps: int):
        logger.setLevel(logging.INFO)  # rank 0 alone has it, and does not know the loss
        self._description, self._steps = description, steps
        self._said = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        hidden = not sys.stderr.isatty() and not os.environ.get("ASFT_PROGRESS")
        self._bar = tqdm(total=steps, initial=done, desc=description, unit="step", disable=hidden)

    def show(self, line: Mapping[str, Any], peak: float | None) -> None:
        """Shows a step.

        Args:
            line: its object in metrics.jsonl.
            peak: what a GPU can do, 10^12 operations a second; None where that is not known.
        """
        shown = {key: f"{line[key]:.4g}" for key in _SHOWN if line[key] is not None}
        name, speed = speed_in_short(line, peak)
        shown |= {"tokens/s": f"{line['tokens_per_second']:,.0f}", name: speed}
        self._seconds.append(line["seconds"])
        left = duration(statistics.median(self._seconds) * (self._steps - line["step"]))
        self._bar.set_postfix({**shown, "left": left}, refresh=False)
        self._bar.update(1)
        if self._bar.disable and self._due(line["step"]):
            self._said = time.monotonic()
            text = " ".join(f"{key} {value}" for key, value in shown.items())
            logger.info(
                "%s: step %d/%d %s, about %s left",
                self._description,
                line["step"],
                self._steps,
                text,
                left,
            )

    def close(self) -> None:
        """Ends the bar's line."""
        self._bar.close()

    def _due(self, step: int) -> bool:
        tenth = step % max(1, self._steps // _LINES) == 0 or step == self._steps
        return tenth or time.monotonic() - self._said >= _SECONDS


def duration(seconds: float) -> str:
    """A time that is left, in the two largest units it has."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def speed_in_short(line: Mapping[str, Any], peak: float | None) -> tuple[str, str]:
    """What a step's speed is called and its value, the frozen models' operations apart: they are work, but train nothing.

    Args:
        line: the step's object in metrics.jsonl.
        peak: what a GPU can do, 10^12 operations a second; without it the speed is in these, and not called mfu.
    """
    name, unit = ("TFLOP/s", 1.0) if peak is None else ("mfu", peak)
    policy, frozen = line["tflops_per_gpu"] / unit, line["reference_tflops_per_gpu"] / unit
    return name, f"{policy:.3g}" + (f" (reference {frozen:.3g})" if frozen else "")
