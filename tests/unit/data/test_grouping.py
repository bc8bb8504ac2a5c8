"""Batches of similar lengths hold each item once an epoch, whatever the ranks, and are padded no further than they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from asft_nemo.config.schema import RunConfig, from_dict
from asft_nemo.data import GlobalBatchSampler, training_order
from asft_nemo.data.grouping import CHUNK, GroupedByLength, PaddedToLongest, padded_lengths
from asft_nemo.data.ordering import order_words, padding_multiple


def order_of(lengths: Any, batch: int, seed: int = 1) -> GroupedByLength:
    return GroupedByLength(np.asarray(lengths), seed=seed, global_batch_size=batch)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_epoch_holds_each_item_once_up_to_its_last_batch(
    lengths: list[int], batch: int, seed: int
) -> None:
    """Inside a global batch two epochs may be mixed, so an item is counted over whole batches."""
    size, order = len(lengths), order_of(lengths, batch, seed)
    for epochs in (1, 3):
        whole = epochs * size // batch * batch
        counts = np.bincount(order.at(np.arange(whole)), minlength=size)
        assert counts.max() <= epochs
        counts = np.bincount(order.at(np.arange(whole + batch)), minlength=size)
        assert counts.min() >= epochs


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    resumed=st.integers(0, 40),
)
def test_a_global_batch_depends_on_its_place_and_size_alone(
    lengths: list[int], sizes: tuple[int, int, int], resumed: int
) -> None:
    micro, ranks, per_rank = sizes
    batch = micro * ranks * per_rank
    found: list[int] = []
    for rank in range(ranks):
        sampler = GlobalBatchSampler(
            order_of(lengths, batch),
            consumed_samples=resumed * batch,
            micro_batch_size=micro,
            global_batch_size=batch,
            dp_rank=rank,
            dp_size=ranks,
        )
        batches = iter(sampler)
        found += [index for _ in range(per_rank) for index in next(batches)]
    unbroken = order_of(lengths, batch)
    for step in range(resumed):  # as the run before it saw it
        unbroken.at(np.arange(step * batch, (step + 1) * batch))
    whole = unbroken.at(np.arange(resumed * batch, (resumed + 1) * batch))
    assert sorted(found) == sorted(whole.tolist())
    assert (np.diff(np.asarray(lengths)[whole]) <= 0).all()  # the longest first


def test_lengths_of_a_batch_are_alike_and_batches_are_in_no_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, size=8 * CHUNK * 3 + 5)
    order = order_of(lengths, 8)
    batches = lengths[order.at(np.arange(8 * CHUNK * 3))].reshape(-1, 8)
    spread = (batches.max(axis=1) - batches.min(axis=1)).mean()
    assert spread < 1000 / CHUNK * 2
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(axis=1))[0, 1]) < 0.2
    orders = {
        tuple(order_of(lengths, 8, seed).at(np.arange(start, start + 24)))
        for seed in (1, 2)
        for start in (0, 1600)
    }
    assert len(orders) == 4


class Padded(torch.utils.data.Dataset):
    """Items of 1 to 30 tokens in rows of 30; the tokens are the item's number, the padding -1."""

    sequence_length = 30
    lengths = np.asarray([5, 30, 17, 16, 1, 8])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.full((30,), -1)
        row[: self.lengths[index]] = index
        return {"tokens": row, "sample_id": torch.tensor(index)}


@pytest.mark.parametrize(
    ("indices", "width"), [([0, 4], 8), ([5, 4], 8), ([0, 3], 16), ([2, 3], 24), ([1, 0], 30)]
)
def test_a_micro_batch_is_as_wide_as_its_longest_needs(indices: list[int], width: int) -> None:
    loader = DataLoader(PaddedToLongest(Padded(), multiple_of=8), batch_sampler=[indices])
    (batch,) = list(loader)
    assert batch["tokens"].shape == (2, width)
    assert batch["sample_id"].tolist() == indices
    for row, index in zip(batch["tokens"], indices, strict=True):
        assert int((row == index).sum()) == Padded.lengths[index]


def run_of(**parallel: Any) -> RunConfig:
    return from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": "somewhere"},
            "data": {"group_by_length": True, "sequence_length": 30},
            "parallel": parallel,
            "trainer": {"global_batch_size": 6, "micro_batch_size": 2},
        }
    )


def test_rows_divide_among_the_ranks_of_a_sequence() -> None:
    assert padding_multiple(run_of()) == 8
    assert padding_multiple(run_of(tp_size=4)) == 8
    assert padding_multiple(run_of(tp_size=4, sequence_parallel=True)) == 32
    assert padded_lengths(np.asarray([1, 8, 9]), multiple_of=8, sequence_length=12).tolist() == [8, 8, 12]


def test_the_summary_says_what_it_saves() -> None:
    """Micro batches of 30 and 17, 16 and 8, 5 and 1 tokens, in rows of 30, 16 and 8."""
    order = training_order(run_of(), Padded())
    used, before = 77 / (2 * (30 + 16 + 8)), 77 / 180
    assert order_words(run_of(), order, Padded(), 1) == (
        f"; micro batches of similar lengths: {100 * used:.1f} % of their places used, "
        f"{100 * before:.1f} % at data.sequence_length=30"
    )
