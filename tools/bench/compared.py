"""How far the metrics of two runs are apart, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Lines = Sequence[dict[str, Any]]

STEP = "step"


@dataclass(frozen=True)
class Difference:
    """The largest difference of two runs.

    Attributes:
        size: of a metric's values at one step, relative to the largest value that the metric has in the first run; 0 where every value is the
            same to the bit, infinity where one run has a step, a metric or a value that the other does not.
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scales(lines: Lines) -> dict[str, float]:
    """Metric -> the largest size of its values."""
    found: dict[str, float] = {}
    for line in lines:
        for metric, value in line.items():
            if _is_number(value):
                found[metric] = max(found.get(metric, 0.0), abs(value))
    return found


def _size(one: Any, other: Any, scale: float) -> float:
    if one == other:
        return 0.0
    if not (_is_number(one) and _is_number(other)) or scale == 0.0:
        return math.inf
    return abs(one - other) / scale
