"""Which checkpoints stay: the last ones, or the best by a validation metric beside the latest."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

from asft_nemo.checkpoint.staging import sync_directory
from asft_nemo.run_dir import checkpoint_steps, point_at

logger = logging.getLogger(__name__)

BEST = "best"
REMOVED = "removed_"  # before the name of a checkpoint that goes: what is left of it passes for none


class Keep:
    """`trainer.keep`: ``last:N``, or ``best:METRIC``, where smaller is better.

    With ``best:METRIC`` every validation that beats all before it asks for a checkpoint; that one and the latest stay, and the link
    ``checkpoints/best`` leads to it. After a resume, what was best is read from its step's line in metrics.jsonl.

    Args:
        text: the setting.
        run_dir: folder of the run.
    """

    def __init__(self, text: str, run_dir: Path):
        kind, _, what = text.partition(":")
        self.metric = what if kind == "best" else None
        self._number = int(what) if kind == "last" else 1
        self._run_dir, self._folder = run_dir, run_dir / "checkpoints"
        self._best: float | None = None

    def best_step(self) -> int | None:
        """The step that the link to the best leads to on this machine; None without one."""
        link = self._folder / BEST
        if self.metric is None or not link.is_dir():
            return None
        return int(link.resolve().name.removeprefix("step_"))

    def value_at(self, step: int) -> float:
        """The metric of a step in metrics.jsonl, as it is once the rank that writes it has dropped a torn end; minus infinity where it has none."""
        found, metrics = -math.inf, self._run_dir / "metrics.jsonl"
        for text in metrics.read_text().splitlines() if metrics.exists() else ():
            line = json.loads(text)
            if line["step"] == step and line.get(self.metric) is not None:
                found = line[self.metric]
        return found

    def restore(self, value: float) -> None:
        """Takes a value for the best so far, the same one on every rank, when training starts; infinity for none."""
        self._best = value if math.isfinite(value) else None

    def is_best(self, value: float) -> bool:
        """Whether a validation's value beats all before it, which it then replaces; infinity and NaN never do."""
        if not math.isfinite(value) or (self._best is not None and value >= self._best):
            return False
        self._best = value
        return True

    def tidy(self, step: int, *, best: bool) -> None:
        """After the checkpoint of `step` is complete: moves the link to the best, removes what does not stay. One rank calls it."""
        if best:
            point_at(self._folder, BEST, f"step_{step}")
            sync_directory(self._folder)  # before the best so far goes
            logger.info("step %d is the best so far: %s %.6g", step, self.metric, self._best)
        kept = self.best_step()
        done = [number for number in checkpoint_steps(self._folder) if number <= step]
        for number in done[: -self._number]:
            if number != kept:
                self._remove(f"step_{number}")

    def _remove(self, name: str) -> None:
        """A file that another process has open may stay on some file systems: that ends no run, the next start tries again."""
        removed = self._folder / f"{REMOVED}{name}"
        try:
            (self._folder / name).rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning(
                "%s could not be removed (%s): remove it when nothing reads it any more", removed, error
            )
