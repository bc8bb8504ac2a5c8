"""How far figures are apart: the metrics of two runs step by step, and the worst of several measured numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Lines = Sequence[dict[str, Any]]

STEP = "step"


@dataclass(frozen=True)
class Difference:
    """The largest difference of two runs.

    Attributes:
        size: of a metric's values at one step, relative to the largest finite value that the metric has in the first run; 0 where every value is
            the same to the bit or is no number in both, infinity where one run has a step, a metric, a number or another value that the other
            does not.
        metric: where it is; empty where nothing differs.
        step: likewise; 0 where nothing differs or the runs have different numbers of steps.
        added: metrics that the second run alone has; no difference, for a change may bring a metric.
    """

    size: float
    metric: str = ""
    step: int = 0
    added: tuple[str, ...] = ()

    @property
    def bits(self) -> bool:
        """Whether every metric of the first run is in the second, the same to the bit."""
        return self.size == 0.0

    def said(self) -> str:
        """For a table."""
        if self.bits:
            return "same bits"
        where = f"{self.metric}, step {self.step}" if self.step else self.metric
        return f"{self.size:.1e} ({where})"


def difference(first: Lines, second: Lines) -> Difference:
    """The largest difference of any metric at any step; of several equal ones the earliest."""
    added = tuple(sorted({key for line in second for key in line} - {key for line in first for key in line}))
    if len(first) != len(second):
        return Difference(math.inf, f"{len(first)} steps against {len(second)}", added=added)
    scales = _scales(first)
    worst = Difference(0.0, added=added)
    for one, other in zip(first, second, strict=True):
        for metric, value in one.items():
            size = _size(value, other.get(metric), scales.get(metric, 0.0)) if metric in other else math.inf
            if size > worst.size:
                worst = Difference(size, metric, one[STEP], added)
    return worst


def figures(lines: Lines, metric: str) -> list[float]:
    """A metric of every step; not a number where metrics.jsonl, which is strict JSON, has null for one that is not finite."""
    return [math.nan if line[metric] is None else line[metric] for line in lines]


def worst(numbers: Iterable[float]) -> float:
    """The largest; not a number where one of them is none, for `max` would pass over it. Infinite where there are none."""
    found = list(numbers)
    if any(math.isnan(one) for one in found):
        return math.nan
    return max(found, default=math.inf)


def largest(own: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference, relative to `other`, see `worst`; infinite where steps are missing."""
    if len(own) != len(other):
        return math.inf
    return worst(abs(a - b) / abs(b) if b else math.inf for a, b in zip(own, other, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scales(lines: Lines) -> dict[str, float]:
    """Metric -> the largest size of its finite values."""
    found: dict[str, float] = {}
    for line in lines:
        for metric, value in line.items():
            if _is_number(value) and math.isfinite(value):
                found[metric] = max(found.get(metric, 0.0), abs(value))
    return found


def _size(one: Any, other: Any, scale: float) -> float:
    if one == other:
        return 0.0
    if not (_is_number(one) and _is_number(other)):
        return math.inf
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return math.inf if scale == 0.0 else abs(one - other) / scale
