"""What chance does to a figure: bootstrap intervals over examples, a test of paired differences, and Holm's correction for many tests.

An example is what is drawn anew; the completions of one example stay together, because they are not independent. Examples with the
same score are interchangeable, so a resample is a multinomial draw of how often each distinct score comes: the same distribution
as drawing examples one by one, at a fraction of the cost. All draws come from fixed seeds: a comparison made twice is the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
SEED = 0
COVERAGE = 0.95

_NUMBERS_AT_ONCE = 2**24
"""Entries of a block of draws: 128 MiB."""
_DRAWS_AT_ONCE = 2**20
"""Examples drawn in a block: few enough for the processor's caches."""
_SAME = 1e-12
"""Sums of the same numbers in another order differ by less."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Stratum:
    """Examples that are drawn from among themselves: a suite, or the texts of a set.

    Attributes:
        sums: of each example, `[n]`: its score, or what is summed over its tokens.
        weights: of each example, `[n]`: 1, or its number of tokens. The figure is the sum of `sums` over the sum of `weights`.
    """

    sums: Floats
    weights: Floats

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.sums.sum() / self.weights.sum())


def scores(values: Sequence[float] | Floats) -> Stratum:
    """A stratum whose figure is the mean."""
    sums = np.asarray(values, dtype=np.float64)
    return Stratum(sums, np.ones_like(sums))


def bootstrap(strata: Sequence[Stratum], *, seed: int = SEED, resamples: int = RESAMPLES) -> Interval:
    """The mean of the strata's figures with its percentile interval, every stratum resampled by itself (Efron 1979).

    Scores that are all the same leave nothing to resample: the interval is then a point.

    Args:
        strata: at least one, none of them empty.
        seed: of the draws.
        resamples: how many.
    """
    generator = np.random.default_rng(seed)
    value = float(np.mean([stratum.value for stratum in strata]))
    drawn: Floats = np.mean([_figures(stratum, generator, resamples) for stratum in strata], axis=0)
    return _interval(value, drawn)


def bootstrap_together(
    sums: Mapping[str, Floats], weights: Floats, *, seed: int = SEED, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """`bootstrap` of several figures of the same examples, all from the same resamples: the draws are what takes the time.

    Args:
        sums: figure -> of each example, `[n]`; see `Stratum`.
        weights: of each example, `[n]`.
        seed: of the draws.
        resamples: how many.
    """
    generator: Any = np.random.default_rng(seed)  # numpy's stubs of integers() are incomplete
    n = len(weights)
    table = np.stack([*sums.values(), weights], axis=1)
    block = max(1, _DRAWS_AT_ONCE // n)
    drawn: list[Floats] = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        rows = np.arange(size)[:, None] * n
        times = np.bincount((generator.integers(0, n, (size, n)) + rows).ravel(), minlength=size * n)
        totals = times.reshape(size, n).astype(np.float64) @ table
        drawn.append(totals[:, :-1] / totals[:, -1:])
    figures = np.concatenate(drawn)
    return {
        name: _interval(Stratum(one, weights).value, figures[:, i])
        for i, (name, one) in enumerate(sums.items())
    }


def _interval(value: float, drawn: Floats) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = (float(bound) for bound in np.quantile(drawn, (tail, 1 - tail)).tolist())
    if high - low <= _SAME:
        return Interval(value, value, value)
    return Interval(value, low, high)


def _figures(stratum: Stratum, generator: np.random.Generator, resamples: int) -> Floats:
    """The figure of every resample, `[resamples]`."""
    # A pair as one complex number: numpy finds distinct numbers much faster than distinct rows.
    pairs, counts = np.unique(stratum.sums + 1j * stratum.weights, return_counts=True)
    n = len(stratum.sums)
    block = max(1, _NUMBERS_AT_ONCE // len(pairs))
    found: list[Floats] = []
    for start in range(0, resamples, block):
        times = generator.multinomial(n, counts / n, size=min(block, resamples - start))
        found.append((times @ pairs.real) / (times @ pairs.imag))
    return np.concatenate(found)


def sign_flip(differences: Sequence[Floats], *, seed: int = SEED, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of paired differences, exact up to the draws for any number of examples (Fisher 1935).

    If the two models were alike, each example's difference could as well have had the other sign. The p-value is the share of random signs
    (the observed ones among them) whose sum is as far from zero. For one answer an example it is McNemar's exact test.
    Unlike a bootstrap interval it stays honest where few examples differ: three gained and none lost have p = 0.25.

    Args:
        differences: of each stratum, `[n]`; the tested figure is the mean of the strata's means.
        seed: of the draws.
        resamples: how many.
    """
    steps = np.concatenate([one / len(one) for one in differences])
    observed = abs(float(steps.sum()))
    sizes, counts = np.unique(np.abs(steps[steps != 0]), return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for size, count in zip(sizes, counts, strict=True):
        drawn += size * (2 * generator.binomial(count, 0.5, size=resamples) - count)
    as_far = int((np.abs(drawn) >= observed - _SAME).sum())
    return (1 + as_far) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: the chance of any false finding among all tests stays below the level (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    so_far = 0.0
    for rank, place in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = so_far
    return adjusted
