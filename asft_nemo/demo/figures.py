"""From what every model did to the report's figures: estimates with 95 % intervals, and paired differences.

All models answer the same tests and read the same text, so two of them are compared example by example, which is far sharper
than comparing two intervals. An interval covers the choice of tests (or text) only; how much the training seed matters is in
`per_seed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from asft_eval.statistics import Z_95, wilson_interval

from asft_nemo.demo.measure import Measured

# Two-sided 95 % points of Student's t distribution, by degrees of freedom.
T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

KL_DIRECTIONS = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and the figure of every seed alone."""

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """All models of one objective, one a seed; the base is a group of one.

    Attributes:
        name: the objective's, or "base".
        models: in the order of the seeds.
        new_skill: name of the suite of the new skill.
        old_skills: names of the others.
    """

    name: str
    models: tuple[Measured, ...]
    new_skill: str
    old_skills: tuple[str, ...]

    def scores(self, suite: str) -> np.ndarray:
        """1.0 or 0.0, [seeds, examples], fp64."""
        return np.array([model.scores[suite] for model in self.models])

    def kl(self, direction: str) -> np.ndarray:
        """Mean KL of every block of text in nats per token, [seeds, blocks], fp64."""
        return np.array([[getattr(block, direction) for block in model.drift] for model in self.models])

    def tokens(self) -> np.ndarray:
        """Scored tokens of every block, [blocks]."""
        return np.array([block.num_tokens for block in self.models[0].drift], dtype=float)


def accuracy(group: Group, suite: str) -> Estimate:
    """Share of right answers, mean over seeds, with Wilson's interval for the number of tests (not tests times seeds)."""
    scores = group.scores(suite)
    n = scores.shape[1]
    low, high = wilson_interval(round(float(scores.mean(0).sum())), n)
    return Estimate(float(scores.mean()), low, high, _floats(scores.mean(1)))


def old_accuracy(group: Group) -> Estimate:
    """Mean of the old skills' accuracies, each skill alike, with a normal interval from the spread within the skills."""
    scores = [group.scores(name) for name in group.old_skills]
    value = float(np.mean([s.mean() for s in scores]))
    half = Z_95 * _stratified_error([s.mean(0) for s in scores])
    per_seed = np.mean([s.mean(1) for s in scores], axis=0)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), _floats(per_seed))


def drift(group: Group, direction: str) -> Estimate:
    """Mean KL per token (nats), tokens weighing alike, with Student's interval over the blocks of text."""
    kl = group.kl(direction)
    value, low, high = _over_blocks(kl.mean(0), group.tokens())
    return Estimate(value, max(0.0, low), high, _floats(np.average(kl, axis=1, weights=group.tokens())))


def new_difference(one: Group, other: Group) -> Estimate:
    """Accuracy of `one` minus accuracy of `other` on the new skill, paired by example."""
    return _difference(one, other, (one.new_skill,))


def old_difference(one: Group, other: Group) -> Estimate:
    """Mean accuracy of `one` on the old skills minus that of `other`, paired by example."""
    return _difference(one, other, one.old_skills)


def drift_difference(one: Group, other: Group, direction: str = "forward_kl") -> Estimate:
    """KL of `one` minus KL of `other`, nats per token, paired by block of text."""
    gaps = one.kl(direction) - other.kl(direction)  # the base has one row, which serves for every seed
    value, low, high = _over_blocks(gaps.mean(0), one.tokens())
    return Estimate(value, low, high, _floats(np.average(gaps, axis=1, weights=one.tokens())))


def _difference(one: Group, other: Group, suites: Sequence[str]) -> Estimate:
    gaps = [one.scores(name) - other.scores(name) for name in suites]
    value = float(np.mean([g.mean() for g in gaps]))
    centres, variances = zip(*(_padded(g.mean(0)) for g in gaps), strict=True)
    centre, error = float(np.mean(centres)), math.sqrt(sum(variances)) / len(gaps)
    per_seed = np.mean([g.mean(1) for g in gaps], axis=0)
    low, high = min(value, centre - Z_95 * error), max(value, centre + Z_95 * error)
    return Estimate(value, low, high, _floats(per_seed))


def _padded(gaps: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences and its squared error, with half a pair added to each of the four cells (Agresti and Min 2005).

    So that two models that agree on every test are not taken to agree on all there could be.
    """
    values, weights = np.append(gaps, (0.0, 1.0, -1.0)), np.append(np.ones(len(gaps)), (1.0, 0.5, 0.5))
    centre = float(np.average(values, weights=weights))
    return centre, float(np.average((values - centre) ** 2, weights=weights)) / (len(gaps) + 2)


def _stratified_error(per_example: Sequence[np.ndarray]) -> float:
    """Standard error of the mean of the strata's means."""
    return math.sqrt(sum(float(x.var(ddof=1)) / len(x) for x in per_example)) / len(per_example)


def _over_blocks(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    value = float(np.average(values, weights=weights))
    half = T_95[len(values) - 1] * float(values.std(ddof=1)) / math.sqrt(len(values))
    return value, value - half, value + half


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
