"""The yardstick of these tests: no difference may hide behind another pair of tensors, or behind broadcasting."""

import math

import pytest
import torch
from loss_cases import worst

ZERO, ONE = torch.zeros(2), torch.ones(2)


def test_the_largest_difference_counts_wherever_it_is():
    assert worst((ZERO, ZERO), (ONE, ZERO), (ZERO, ZERO)) == 1.0
    assert worst((ZERO, ZERO), (4 * ONE, 2 * ONE)) == 1.0, "relative beyond 1"


@pytest.mark.parametrize("place", range(3))
def test_nan_in_any_pair_is_not_a_small_difference(place):
    pairs = [(ZERO, ZERO)] * 3
    pairs[place] = (torch.tensor([0.0, torch.nan]), ZERO)
    assert math.isnan(worst(*pairs))
    assert not worst(*pairs) <= 1e-12


def test_other_shapes_are_not_compared():
    with pytest.raises(AssertionError, match=r"\(3, 2\) beside \(2,\)"):
        worst((torch.zeros(3, 2), ZERO))
