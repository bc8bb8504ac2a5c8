"""The order of examples is a function of seed and consumed samples alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asft_nemo.config.schema import DataConfig, TrainerConfig
from asft_nemo.data import FILLER, GlobalBatchSampler, SequentialBatchSampler, Shuffled
from asft_nemo.data.ordering import num_steps
from asft_nemo.data.sampler import epoch_order

SIZES = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
)  # micro batch, ranks, micro batches


def global_batches(
    count: int, *, micro: int, ranks: int, per_rank: int, num_samples: int, seed: int, **options: Any
) -> list[list[int]]:
    """The first global batches, put together from all ranks in the order of the stream."""
    size = micro * ranks * per_rank
    samplers = [
        iter(
            GlobalBatchSampler(
                Shuffled(num_samples, seed=seed),
                micro_batch_size=micro,
                global_batch_size=size,
                dp_rank=r,
                dp_size=ranks,
                **options,
            )
        )
        for r in range(ranks)
    ]
    batches: list[list[int]] = []
    for _ in range(count):
        shares = [list(islice(sampler, per_rank)) for sampler in samplers]
        batches.append([index for i in range(per_rank) for share in shares for index in share[i]])
    return batches


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, num_samples=st.integers(1, 50), seed=st.integers(0, 5))
def test_order_does_not_depend_on_ranks_or_micro_batches(
    sizes: tuple[int, int, int], num_samples: int, seed: int
) -> None:
    micro, ranks, per_rank = sizes
    size = micro * ranks * per_rank
    split = global_batches(3, micro=micro, ranks=ranks, per_rank=per_rank, num_samples=num_samples, seed=seed)
    whole = global_batches(3, micro=size, ranks=1, per_rank=1, num_samples=num_samples, seed=seed)
    assert split == whole


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, num_samples=st.integers(1, 50))
def test_every_epoch_holds_each_example_once(sizes: tuple[int, int, int], num_samples: int) -> None:
    micro, ranks, per_rank = sizes
    size = micro * ranks * per_rank
    count = -(-2 * num_samples // size)
    batches = global_batches(
        count, micro=micro, ranks=ranks, per_rank=per_rank, num_samples=num_samples, seed=3
    )
    stream = [index for batch in batches for index in batch]
    for epoch in range(2):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert Counter(part) == Counter(range(num_samples))


@pytest.mark.parametrize("steps_before", [0, 1, 4, 9])
def test_resumed_order_is_the_unbroken_one_also_at_another_layout(steps_before: int) -> None:
    unbroken = global_batches(12, micro=2, ranks=2, per_rank=2, num_samples=13, seed=7)
    resumed = global_batches(
        12 - steps_before,
        micro=1,
        ranks=4,
        per_rank=2,
        num_samples=13,
        seed=7,
        consumed_samples=8 * steps_before,
    )
    assert resumed == unbroken[steps_before:]


def test_iterating_twice_gives_the_same() -> None:
    sampler = GlobalBatchSampler(
        Shuffled(9, seed=1), micro_batch_size=2, global_batch_size=4, dp_rank=0, dp_size=1
    )
    assert list(islice(sampler, 7)) == list(islice(sampler, 7))


def test_seeds_and_epochs_shuffle_differently() -> None:
    orders = {tuple(epoch_order(30, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_of_a_seed_never_changes() -> None:
    # A changed order would make resumed runs see other samples than the run they continue.
    assert epoch_order(8, seed=42, epoch=0).tolist() == EXPECTED_ORDER


EXPECTED_ORDER = [4, 1, 3, 6, 0, 7, 2, 5]


def test_sizes_that_do_not_fit_are_refused() -> None:
    good: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 4, "dp_rank": 0, "dp_size": 2}
    for change in ({"global_batch_size": 6}, {"dp_rank": 2}, {"consumed_samples": 2}):
        with pytest.raises(ValueError):
            GlobalBatchSampler(Shuffled(9, seed=1), **{**good, **change})
    with pytest.raises(ValueError):
        Shuffled(0, seed=1)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, num_samples=st.integers(1, 50))
def test_sequential_pass_holds_each_example_once_and_fills_up(
    sizes: tuple[int, int, int], num_samples: int
) -> None:
    micro, ranks, per_rank = sizes
    size = micro * ranks * per_rank
    seen: list[int] = []
    for rank in range(ranks):
        sampler = SequentialBatchSampler(
            num_samples, micro_batch_size=micro, global_batch_size=size, dp_rank=rank, dp_size=ranks
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.num_global_batches * per_rank
        seen += [index for batch in batches for index in batch]
    assert sorted(index for index in seen if index != FILLER) == list(range(num_samples))
    assert len(seen) == -(-num_samples // size) * size


def test_number_of_steps() -> None:
    def steps(items: int, **trainer: Any) -> int:
        return num_steps(Shuffled(items, seed=0), items, TrainerConfig(**trainer), DataConfig())

    assert steps(100, max_steps=7, epochs=3, global_batch_size=8) == 7
    assert steps(100, epochs=1, global_batch_size=8) == 13
    assert steps(100, epochs=0.5, global_batch_size=10) == 5
    assert steps(1, epochs=0.01, global_batch_size=64) == 1


def test_a_step_looked_up_is_the_step_taken() -> None:
    """Over more than an epoch, and whatever was looked up before."""
    given = {"micro_batch_size": 2, "global_batch_size": 8, "dp_size": 2}
    for rank in range(2):
        taken = iter(GlobalBatchSampler(Shuffled(13, seed=7), dp_rank=rank, **given))
        lookup = GlobalBatchSampler(Shuffled(13, seed=7), dp_rank=rank, consumed_samples=24, **given)
        steps = [[index for batch in islice(taken, 2) for index in batch] for _ in range(6)]
        assert [lookup.of_step(8 * step) for step in (5, 0, 3, 1, 4, 2)] == [
            steps[step] for step in (5, 0, 3, 1, 4, 2)
        ]
