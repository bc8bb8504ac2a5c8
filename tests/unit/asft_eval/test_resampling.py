"""Intervals, tests and corrections against what they promise: coverage, false alarms, published and hand-made values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asft_eval import resampling
from asft_eval.resampling import Floats, Stratum, bootstrap, holm, scores, sign_flip

Draw = Callable[[np.random.Generator], Floats]
SIMULATIONS = 2000
RESAMPLES = 500


def right_or_wrong(n: int, share: float) -> Draw:
    return lambda rng: (rng.random(n) < share).astype(float)


def of_16(n: int, a: float, b: float) -> Draw:
    """The share of 16 completions that is right, for examples whose difficulty is Beta(a, b): most are easy or hard."""
    return lambda rng: rng.binomial(16, rng.beta(a, b, n)) / 16


def gained_or_lost(n: int, gained: float, lost: float) -> Draw:
    return lambda rng: rng.choice([1.0, -1.0, 0.0], n, p=[gained, lost, 1 - gained - lost])


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (right_or_wrong(200, 0.3), 0.3),
        (of_16(200, 0.3, 0.7), 0.3),
        (gained_or_lost(500, 0.1, 0.05), 0.05),
    ],
)
def test_intervals_of_95_per_cent_cover_within_two_points(draw: Draw, truth: float):
    rng = np.random.default_rng(1)
    covered = 0
    for number in range(SIMULATIONS):
        interval = bootstrap([scores(draw(rng))], seed=number, resamples=RESAMPLES)
        covered += interval.low - 1e-12 <= truth <= interval.high + 1e-12
    assert 0.93 <= covered / SIMULATIONS <= 0.97


def test_two_seeds_of_one_model_are_rarely_called_different():
    """A 5 % test finds at most 18 of 200 with a probability of 99 %."""
    rng = np.random.default_rng(2)
    found = 0
    for number in range(200):
        difficulty = rng.beta(0.4, 0.8, 300)
        one, other = (rng.binomial(16, difficulty) / 16 for _ in range(2))
        found += sign_flip([one - other], seed=number, resamples=RESAMPLES) < 0.05
    assert 1 <= found <= 18


def test_a_real_difference_is_found():
    rng = np.random.default_rng(3)
    difficulty = rng.beta(0.4, 0.8, 300)
    one, other = rng.binomial(16, difficulty) / 16, rng.binomial(16, 0.8 * difficulty) / 16
    assert sign_flip([one - other]) < 0.001
    assert bootstrap([scores(one - other)]).low > 0


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(3, 0, 0.25), (6, 0, 0.03125), (15, 5, 0.04139), (7, 7, 1.0)]
)
def test_of_right_and_wrong_the_test_is_mc_nemars_exact_one(gained: int, lost: int, p: float):
    """Two-sided binomial probabilities of so lopsided a split, from a table."""
    gaps = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 80)
    assert sign_flip([gaps], resamples=100_000) == pytest.approx(p, abs=0.004)


def test_what_is_the_same_differs_by_exactly_nothing():
    nothing = np.zeros(500)
    interval = bootstrap([scores(nothing)])
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert sign_flip([nothing]) == 1.0


def test_draws_are_the_same_every_time():
    values = np.random.default_rng(4).random(50)
    assert bootstrap([scores(values)]) == bootstrap([scores(values)])
    assert sign_flip([values - 0.4]) == sign_flip([values - 0.4])


def test_drawing_distinct_scores_is_drawing_examples():
    """Against a bootstrap that draws one example after the other."""
    rng = np.random.default_rng(5)
    sums, weights = rng.integers(0, 3, 60).astype(float), rng.integers(1, 4, 60).astype(float)
    places = rng.integers(0, 60, (20_000, 60))
    drawn = sums[places].sum(1) / weights[places].sum(1)
    interval = bootstrap([Stratum(sums, weights)])
    assert interval.value == pytest.approx(sums.sum() / weights.sum())
    assert [interval.low, interval.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_figures_of_the_same_examples_share_their_draws(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(6)
    n, weights = 300, rng.integers(1, 40, 300).astype(float)
    sums = {"a": weights * rng.normal(2, 1, n), "b": weights * rng.random(n), "none": np.zeros(n)}
    drawn: list[int] = []

    class Counting(np.random.Generator):
        def integers(self, *words: Any, **named: Any) -> Any:
            found = super().integers(*words, **named)
            drawn.append(found.size)
            return found

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counting(np.random.PCG64(seed)))
    monkeypatch.setattr(resampling, "_DRAWS_AT_ONCE", 100_000)
    together = resampling.bootstrap_together(sums, weights)
    assert (sum(drawn), max(drawn) <= 100_000) == (n * resampling.RESAMPLES, True)
    monkeypatch.undo()
    for name, one in sums.items():
        alone, width = bootstrap([Stratum(one, weights)]), 0.05 * float(one.std() / weights.mean())
        assert together[name].value == alone.value
        assert together[name].low == pytest.approx(alone.low, abs=width / 10 + 1e-12)
        assert together[name].high == pytest.approx(alone.high, abs=width / 10 + 1e-12)
    assert together["none"] == resampling.Interval(0.0, 0.0, 0.0)


def test_strata_weigh_alike_whatever_their_size():
    small, large = scores(np.array([0.0, 1.0] * 10)), scores(np.array([0.2] * 1000))
    interval = bootstrap([small, large])
    assert interval.value == pytest.approx(0.35)
    alone = bootstrap([small])
    assert interval.high - interval.low == pytest.approx((alone.high - alone.low) / 2, abs=0.02)


def test_holm_as_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
