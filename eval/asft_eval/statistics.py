"""What a share of right answers is worth: its standard error and its Wilson interval."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def standard_error(right: int, n: int) -> float:
    """`sqrt(a (1 - a) / n)` of the share `a = right / n`; 0 where all or none are right."""
    share = right / n
    return math.sqrt(share * (1 - share) / n)


def wilson_interval(right: float, n: float, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): sensible at 0 and 1 and for small n, unlike the normal one.

    Args:
        right: successes, 0 to n.
        n: trials, more than 0; both may be fractions where trials are not independent.
        z: normal quantile of the coverage.

    Returns:
        Lower and upper bound, within [0, 1].
    """
    share = right / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
