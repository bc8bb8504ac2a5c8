"""The report's figures: values by hand, intervals that cover what they claim to cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from asft_eval.kl import Drift
from asft_eval.statistics import wilson_interval

from asft_nemo.demo import figures
from asft_nemo.demo.figures import Group
from asft_nemo.demo.measure import Measured


def group(*scores: dict[str, tuple[float, ...]], kl: tuple[tuple[float, ...], ...] = ()) -> Group:
    blocks = kl or tuple((0.0, 0.0) for _ in scores)
    models = tuple(
        Measured(
            f"m{i}",
            one,
            tuple(Drift(v, 2 * v, 0, 0, num_tokens=100 * (j + 1), num_texts=1) for j, v in enumerate(of)),
        )
        for i, (one, of) in enumerate(zip(scores, blocks, strict=True))
    )
    return Group("m", models, "new", tuple(name for name in scores[0] if name != "new"))


def test_accuracy_is_the_mean_of_seeds_with_the_interval_of_the_tests():
    both = group({"new": (1, 1, 1, 0)}, {"new": (1, 0, 1, 0)})
    found = figures.accuracy(both, "new")
    assert found.value == 0.625
    assert found.per_seed == (0.75, 0.5)
    assert (found.low, found.high) == wilson_interval(round(2.5), 4)


def test_old_skills_weigh_alike_whatever_their_number_of_tests():
    one = group({"new": (1,), "a": (1, 1, 1, 1, 1, 1, 1, 0), "b": (0, 1)})
    found = figures.old_accuracy(one)
    assert found.value == pytest.approx((0.875 + 0.5) / 2)
    error = math.sqrt(np.var([1] * 7 + [0], ddof=1) / 8 + np.var([0, 1], ddof=1) / 2) / 2
    assert found.high - found.value == pytest.approx(min(1 - found.value, 1.959964 * error), rel=1e-5)


def test_differences_are_paired_by_test():
    """Two models that differ on few tests are told apart although their own intervals overlap."""
    n = 200
    better = group({"new": tuple(float(i % 10 != 0) for i in range(n))})
    worse = group({"new": tuple(float(i % 10 > 0 and i % 20 > 1) for i in range(n))})
    gap = figures.new_difference(better, worse)
    assert gap.value == pytest.approx(0.05)
    assert 0 < gap.low < gap.value < gap.high
    assert figures.accuracy(worse, "new").high > figures.accuracy(better, "new").low
    back = figures.new_difference(worse, better)
    assert (back.value, back.low, back.high) == pytest.approx((-gap.value, -gap.high, -gap.low))


def test_the_base_serves_for_every_seed():
    base = group({"new": (1, 0, 0, 0)})
    seeds = group({"new": (1, 1, 0, 0)}, {"new": (1, 1, 1, 1)})
    assert figures.new_difference(seeds, base).per_seed == (0.25, 0.75)


def test_agreement_on_every_test_is_no_certainty():
    one = group({"new": (1,) * 30})
    gap = figures.new_difference(one, one)
    assert gap.value == 0
    assert gap.low < 0 < gap.high


def test_intervals_of_differences_cover():
    """About 95 % of intervals hold the true difference: 0.3 of the tests are decided differently by two made-up models."""
    rng = np.random.default_rng(0)
    truth, hits, times = 0.1, 0, 400
    for _ in range(times):
        draws = rng.random(100)
        one = tuple(float(x < 0.7) for x in draws)
        other = tuple(float(x < 0.5 or 0.7 <= x < 0.8) for x in draws)
        gap = figures.new_difference(group({"new": one}), group({"new": other}))
        hits += gap.low <= truth <= gap.high
    assert 0.92 <= hits / times <= 0.985


def test_drift_weighs_tokens_alike_and_is_never_below_zero():
    one = group({"new": (1,)}, kl=((0.1, 0.4),))
    found = figures.drift(one, "forward_kl")
    assert found.value == pytest.approx((0.1 * 100 + 0.4 * 200) / 300)
    assert found.low == 0
    half = 12.706 * np.std([0.1, 0.4], ddof=1) / math.sqrt(2)
    assert found.high == pytest.approx(found.value + half)
    assert figures.drift(one, "reverse_kl").value == pytest.approx(2 * found.value)


def test_drift_differences_are_paired_by_block():
    one = group({"new": (1,)}, kl=((0.1, 1.1),))
    other = group({"new": (1,)}, kl=((0.3, 1.3),))
    gap = figures.drift_difference(one, other)
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.2, -0.2, -0.2))
