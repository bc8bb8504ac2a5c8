"""Every token on exactly one rank, in equal shares of tokens and of work, by the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asft_nemo.data.context_slices import positions_of_ranks, segment_bounds, segment_multiple
from asft_nemo.data.packing import PackedDataset

CASES = st.integers(1, 4).flatmap(
    lambda cp_size: st.tuples(
        st.just(cp_size),
        st.lists(st.integers(1, 5).map(lambda n: n * segment_multiple(cp_size)), min_size=1, max_size=6),
    )
)


def by_the_book(lengths: list[int], cp_size: int) -> list[list[int]]:
    """Rank r takes chunk r and chunk 2 * cp_size - 1 - r of each segment."""
    taken: list[list[int]] = [[] for _ in range(cp_size)]
    start = 0
    for length in lengths:
        row, size = list(range(start, start + length)), length // (2 * cp_size)
        for rank, places in enumerate(taken):
            last = 2 * cp_size - 1 - rank
            places += row[rank * size : (rank + 1) * size] + row[last * size : (last + 1) * size]
        start += length
    return taken


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_places_are_those_of_the_definition(case: tuple[int, list[int]]) -> None:
    cp_size, lengths = case
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    places = positions_of_ranks(bounds, cp_size)
    if cp_size > 1:
        assert places.tolist() == by_the_book(lengths, cp_size)
    assert sorted(places.flatten().tolist()) == list(range(sum(lengths)))
    row = torch.randn(sum(lengths))
    restored = torch.empty_like(row)
    restored[places.flatten()] = row[places].flatten()
    assert torch.equal(restored, row)


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_ranks_have_equal_work(case: tuple[int, list[int]]) -> None:
    """The tokens that a rank's tokens attend to, counted in each segment."""
    cp_size, lengths = case
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])
    work = seen[positions_of_ranks(bounds, cp_size)].sum(dim=1)
    assert len(set(work.tolist())) == 1


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_bounds_are_the_cumulative_lengths(lengths: list[int]) -> None:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert segment_bounds(ids).tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()


def test_segments_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="each must be a multiple of 4"):
        positions_of_ranks(torch.tensor([0, 8, 14]), 2)


class Numbered:
    """Examples of given lengths whose tokens are their places, in items of `sequence_length`."""

    def __init__(self, lengths: list[int], sequence_length: int):
        self.lengths, self.sequence_length = np.asarray(lengths), sequence_length
        self.sample_ids = np.arange(len(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def learned_tokens(self, sample_ids: object) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = torch.arange(self.sequence_length)
        valid = place < (self.lengths[index] if index >= 0 else 0)
        return {
            "tokens": place.where(valid, -1),
            "labels": place.where(valid, -1),
            "loss_mask": valid,
            "position_ids": place,
            "sample_id": torch.tensor(index),
        }


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.lists(st.integers(1, 24), min_size=1, max_size=9))
def test_packed_segments_can_be_shared(cp_size: int, lengths: list[int]) -> None:
    """Rounded-up segments hold every token of every example once, and what was rounded up is not learned and of no example."""
    packed = PackedDataset(Numbered(lengths, 24 * cp_size), multiple_of=segment_multiple(cp_size))
    found: dict[int, list[int]] = {}
    for index in range(len(packed)):
        item = packed[index]
        positions_of_ranks(segment_bounds(item["segment_ids"]), cp_size)
        assert torch.equal(item["loss_mask"], item["sample_id"] >= 0)
        for sample, token, position in zip(
            *(item[key].tolist() for key in ("sample_id", "tokens", "position_ids")), strict=True
        ):
            if sample >= 0:
                assert token == position
                found.setdefault(sample, []).append(token)
    assert found == {sample: list(range(length)) for sample, length in enumerate(lengths)}
    assert packed.efficiency == sum(lengths) / (len(packed) * packed.sequence_length)


def test_rows_that_hold_no_whole_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 tokens hold no multiples of 4"):
        PackedDataset(Numbered([3], 10), multiple_of=4)
