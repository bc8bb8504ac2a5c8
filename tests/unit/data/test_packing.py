"""Packing: every token once, nothing mixed, the rows of first-fit-decreasing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asft_nemo.data.packing import FILLER, PackedDataset, first_fit_decreasing


def by_the_book(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, in quadratic time."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for row in rows:
            if sum(lengths[member] for member in row) + lengths[index] <= capacity:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=60))
    )
)
def test_rows_are_those_of_the_definition(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert first_fit_decreasing(lengths, capacity) == by_the_book(lengths, capacity)


@pytest.mark.parametrize("lengths", [[0, 3], [5, -1], [9]])
def test_items_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        first_fit_decreasing(lengths, 8)


def test_many_items_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(20, 2048, 100_000)
    rows = first_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.98


class Counted:
    """Examples whose tokens say where they come from: example and place."""

    def __init__(self, lengths: list[int], domains: list[int], sequence_length: int):
        self.lengths = np.asarray(lengths)
        self.domain_ids = np.asarray(domains)
        self.sample_ids = 100 + np.arange(len(lengths))
        self.sequence_length = sequence_length
        self.report = "what was read"

    def __len__(self) -> int:
        return len(self.lengths)

    def learned_tokens(self, sample_ids: object) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size, length = self.sequence_length, 0 if index == FILLER else int(self.lengths[index])
        place = torch.arange(size)
        valid = place < length
        token = 1000 * (index + 1) + place
        return {
            "tokens": torch.where(valid, token, 7),
            "labels": torch.where(valid, token + 1, 7),
            "loss_mask": valid & (place % 2 == 1),
            "position_ids": place,
            "sample_id": torch.tensor(FILLER if index == FILLER else 100 + index),
            "domain_id": torch.tensor(FILLER if index == FILLER else int(self.domain_ids[index])),
        }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 2)), min_size=1, max_size=30))
def test_nothing_is_lost_doubled_or_mixed(examples: list[tuple[int, int]]) -> None:
    lengths, domains = ([one[part] for one in examples] for part in (0, 1))
    source = Counted(lengths, domains, 16)
    packed = PackedDataset(source)
    seen: Counter[int] = Counter()
    for index in range(len(packed)):
        item = packed[index]
        assert {key: value.shape for key, value in item.items()} == {
            **dict.fromkeys(
                ("tokens", "labels", "loss_mask", "position_ids", "segment_ids", "sample_id"), (16,)
            ),
            "domain_id": (),
        }
        real = item["sample_id"] >= 0
        assert real.sum() == sum(lengths[member] for member in packed.rows[index])
        for sample in item["sample_id"][real].unique().tolist():
            where = item["sample_id"] == sample
            example, length = source[sample - 100], lengths[sample - 100]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(item[key][where], example[key][:length])
            (segment,) = item["segment_ids"][where].unique().tolist()
            assert (item["segment_ids"] == segment).sum() == length
            assert item["domain_id"] == domains[sample - 100]
            seen[sample] += 1
        assert not item["loss_mask"][~real].any()
        assert (item["tokens"][~real] == 7).all()
        assert torch.equal(item["segment_ids"], item["segment_ids"].sort().values)
        assert packed.ids_of([index]).tolist() == item["sample_id"][real].unique_consecutive().tolist()
    assert seen == Counter(range(100, 100 + len(examples)))
    assert sorted(packed.sample_ids.tolist()) == sorted(source.sample_ids.tolist())
    assert packed.efficiency == pytest.approx(sum(lengths) / (16 * len(packed)))
    assert packed.report == "what was read"
    for sample in (100, 100 + len(examples) - 1):
        (row,) = packed.rows_with([sample])
        assert sample in packed.ids_of([row])


def test_a_filler_row_teaches_nothing() -> None:
    item = PackedDataset(Counted([3, 4], [0, 0], 16))[FILLER]
    assert not item["loss_mask"].any()
    assert (item["sample_id"] == FILLER).all()
    assert item["domain_id"] == FILLER
