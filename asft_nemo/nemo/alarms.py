"""What a run warns of while it goes on: a sentence on the terminal and a line in alarms.jsonl. An alarm stops nothing."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from asft_nemo.config.schema import AlarmsConfig
from asft_nemo.run_dir import ALARMS, append_line

logger = logging.getLogger(__name__)

FEWEST = 10  # steps whose median means something: one step of few tokens is far off by itself


class Alarms:
    """The alarms of one run; told on every rank alike, written and said by one.

    Args:
        run_dir: folder of the run.
        is_writer: whether this rank writes.
    """

    def __init__(self, run_dir: Path, is_writer: Callable[[], bool]):
        self._path, self._is_writer = run_dir / ALARMS, is_writer

    def sound(self, kind: str, step: int, text: str, *, said: bool = False) -> None:
        """Adds an alarm.

        Args:
            kind: ``nonfinite``, ``straggler``, ``nll`` or ``kl``.
            step: where, counted from 1 as in metrics.jsonl.
            text: one sentence with what to do.
            said: whether a log line tells it already.
        """
        if not self._is_writer():
            return
        logger.setLevel(logging.INFO)  # the rank that writes need not be the first one, whose lines are shown
        if not said:
            logger.warning("alarm: step %d: %s", step, text)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"time": now, "step": step, "kind": kind, "text": text}
        try:
            append_line(self._path, line)
        except OSError as error:  # a full disk is no reason to end a run that still trains
            logger.warning("%s could not be written: %s", self._path, error)


class CurveAlarms:
    """Looks at each step's means for a jump of the loss and a policy that has left its reference.

    An alarm is sounded where the bound is crossed, and again only after the value was below it in between.

    Args:
        bounds: the settings.
        alarms: where alarms go.
    """

    def __init__(self, bounds: AlarmsConfig, alarms: Alarms):
        self._bounds, self._alarms = bounds, alarms
        self._nll: deque[float] = deque(maxlen=bounds.nll_window)
        self._kl: deque[float] = deque(maxlen=FEWEST)
        self._above: set[str] = set()

    def look(self, line: Mapping[str, Any]) -> None:
        """Looks at a step's object of metrics.jsonl."""
        self._look_at_nll(line)
        self._look_at_kl(line)

    def _look_at_nll(self, line: Mapping[str, Any]) -> None:
        nll, factor = line["nll"], self._bounds.nll_factor
        if nll is None or factor is None:
            return
        if len(self._nll) >= min(FEWEST, self._bounds.nll_window):
            usual = statistics.median(self._nll)
            self._sound_once(
                "nll",
                nll > factor * usual,
                line["step"],
                f"the nll is {nll:.3g}, {nll / usual if usual else float('inf'):.1f} times the median of the {len(self._nll)} steps before: look at "
                "grad_norm and at this step's rows; if it stays, lower optim.lr and go back to an earlier checkpoint",
            )
        self._nll.append(nll)

    def _look_at_kl(self, line: Mapping[str, Any]) -> None:
        kl, bound = line["kl"] if line["kl"] is not None else line["kl_reverse"], self._bounds.max_kl
        if kl is None or bound is None:
            return
        self._kl.append(kl)
        usual = statistics.median(self._kl)
        self._sound_once(
            "kl",
            len(self._kl) == FEWEST and usual > bound,
            line["step"],
            f"the KL to the reference is {usual:.3g} nats per token (median of {FEWEST} steps), above alarms.max_kl={bound:g}: the policy leaves "
            "the base; raise objective.kl_weight or lower optim.lr, or raise the bound",
        )

    def _sound_once(self, kind: str, above: bool, step: int, text: str) -> None:
        if above and kind not in self._above:
            self._alarms.sound(kind, step, text)
        (self._above.add if above else self._above.discard)(kind)
