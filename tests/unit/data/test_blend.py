"""Blends keep their shares at every position, from anywhere, whatever the ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asft_nemo.config.schema import RunConfig, from_dict
from asft_nemo.data import GlobalBatchSampler, PackedDataset, Shuffled, training_order
from asft_nemo.data.blend import LONGEST_PERIOD, Blend, even_schedule, integer_shares
from asft_nemo.data.ordering import num_steps, order_words
from asft_nemo.errors import DataError

WEIGHTS = st.lists(st.integers(1, 60), min_size=2, max_size=7)


def blend_of(sizes: list[int], weights: list[Any], seed: int = 1) -> Blend:
    """Domains of these sizes, whose items follow one another."""
    ends = np.cumsum([0, *sizes])
    members = [np.arange(ends[place], ends[place + 1]) for place in range(len(sizes))]
    return Blend(members, [Fraction(str(weight)) for weight in weights], seed=seed)


@settings(max_examples=60, deadline=None)
@given(shares=WEIGHTS)
def test_every_prefix_is_within_one_of_the_shares(shares: list[int]) -> None:
    schedule, period = even_schedule(shares), sum(shares)
    counts = np.cumsum(schedule[:, None] == np.arange(len(shares)), axis=0)
    positions = np.arange(1, period + 1)[:, None]
    # in whole numbers: | count - n p / Q | < 1
    assert (np.abs(counts * period - positions * np.asarray(shares)) < period).all()
    assert counts[-1].tolist() == list(shares)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**12), seed=st.integers(0, 3))
def test_draws_from_any_position_are_those_of_the_walk_from_the_start(
    weights: list[int], start: int, seed: int
) -> None:
    sizes = [3 + 2 * place for place in range(len(weights))]
    blend = blend_of(sizes, weights, seed)
    whole = blend.at(np.arange(400))
    assert blend_of(sizes, weights, seed).at(np.arange(150, 400)).tolist() == whole[150:].tolist()
    # far away: as many of each domain as the counts before and after say
    ends = np.cumsum(sizes)
    drawn = Counter(np.searchsorted(ends, blend.at(np.arange(start, start + 50)), side="right").tolist())
    before, after = blend.draws(start), blend.draws(start + 50)
    assert [drawn[place] for place in range(len(sizes))] == [
        b - a for a, b in zip(before, after, strict=True)
    ]
    for count, share in zip(before, blend.shares, strict=True):
        assert abs(count * blend.period - start * share) < blend.period


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS)
def test_each_domain_gives_every_item_once_an_epoch(weights: list[int]) -> None:
    sizes = [2 + place for place in range(len(weights))]
    blend, first = blend_of(sizes, weights), 0
    stream = blend.at(np.arange(blend.positions_within(2) + 2 * blend.period))
    for size in sizes:
        own = stream[(stream >= first) & (stream < first + size)]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(first, first + size))
        first += size


def test_epochs_and_domains_and_seeds_shuffle_differently() -> None:
    orders = {
        tuple(Shuffled(30, seed=seed, stream=stream).at(np.arange(epoch * 30, epoch * 30 + 30)))
        for seed in range(2)
        for stream in (None, 0, 1)
        for epoch in range(2)
    }
    assert len(orders) == 12


@settings(max_examples=30, deadline=None)
@given(
    weights=WEIGHTS,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    resumed=st.integers(0, 5),
)
def test_the_stream_does_not_depend_on_ranks_micro_batches_or_a_resume(
    weights: list[int], sizes: tuple[int, int, int], resumed: int
) -> None:
    micro, ranks, per_rank = sizes
    batch = micro * ranks * per_rank
    domain_sizes = [5 + place for place in range(len(weights))]
    shares = [
        iter(
            GlobalBatchSampler(
                blend_of(domain_sizes, weights),
                consumed_samples=resumed * batch,
                micro_batch_size=micro,
                global_batch_size=batch,
                dp_rank=rank,
                dp_size=ranks,
            )
        )
        for rank in range(ranks)
    ]
    found = [index for _ in range(2 * per_rank) for share in shares for index in next(share)]
    whole = blend_of(domain_sizes, weights).at(np.arange(resumed * batch, (resumed + 2) * batch))
    assert found == whole.tolist()


def test_weights_are_exact_to_five_decimals_and_never_nothing() -> None:
    assert integer_shares([Fraction("0.3"), Fraction("0.4"), Fraction("0.3")]) == (3, 4, 3)
    assert integer_shares([Fraction(6), Fraction(2)]) == (3, 1)
    assert integer_shares([Fraction("0.12345"), Fraction("0.87655")]) == (2469, 17531)
    for weights in ([1, 10**9], [1, 1, 10**9, 7], [10**6 + 3, 999_983, 3]):
        shares = integer_shares([Fraction(weight) for weight in weights])
        assert sum(shares) == LONGEST_PERIOD
        for share, weight in zip(shares, weights, strict=True):
            assert share >= 1
            assert abs(share - LONGEST_PERIOD * weight / sum(weights)) < len(weights)


class Items:
    """Examples of known lengths and domains."""

    sequence_length = 16

    def __init__(self, lengths: list[int], domains: list[int]):
        self.lengths, self.domain_ids = np.asarray(lengths), np.asarray(domains)
        self.sample_ids = np.arange(len(lengths))

    def __len__(self) -> int:
        return len(self.lengths)


def run_of(weights: list[float], files: int = 2, epochs: float = 1, **data: Any) -> RunConfig:
    return from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": "somewhere"},
            "data": {"train": [f"{place}.jsonl" for place in range(files)], "weights": weights, **data},
            "trainer": {"global_batch_size": 4, "epochs": epochs},
        }
    )


def shares_of(run: RunConfig, items: Any, drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples and input tokens of each domain in the first items of the stream, as shares."""
    indices = training_order(run, items).at(np.arange(drawn))
    examples: Any = items.examples if isinstance(items, PackedDataset) else items
    chosen = [index for row in indices for index in (items.rows[row] if examples is not items else [row])]
    domains = examples.domain_ids[chosen]
    counts = np.bincount(domains)
    tokens = np.bincount(domains, weights=examples.lengths[chosen])
    return counts / counts.sum(), tokens / tokens.sum()


LENGTHS = Items([2, 3, 4, 3, 12, 13, 11, 12, 13, 10], [0] * 4 + [1] * 6)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_shares_of_examples_or_of_tokens(packed: bool) -> None:
    items: Any = PackedDataset(LENGTHS) if packed else LENGTHS  # type: ignore[arg-type]
    examples, _ = shares_of(run_of([0.25, 0.75]), items, 4800)
    assert examples[0] == pytest.approx(0.25, abs=0.002)
    _, tokens = shares_of(run_of([0.25, 0.75], weights_by="tokens"), items, 4800)
    assert tokens[0] == pytest.approx(0.25, abs=0.002)


def test_a_domain_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(DataError, match=r"a weight for 1\.jsonl, of which no example is left"):
        training_order(run_of([1, 1]), Items([3, 3], [0, 0]))


def test_without_weights_the_stream_is_one_shuffle_of_all() -> None:
    plain = training_order(run_of([]), LENGTHS).at(np.arange(25))
    assert plain.tolist() == Shuffled(10, seed=42).at(np.arange(25)).tolist()


@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], [0.01, 0.99]])
def test_stop_ends_before_a_domain_is_seen_more_often_than_epochs(
    weights: list[float], epochs: float
) -> None:
    run = run_of(weights, epochs=epochs, when_exhausted="stop")
    order = training_order(run, LENGTHS)
    assert isinstance(order, Blend)
    most = order.positions_within(epochs)
    assert max(order.epochs(most)) <= epochs < max(order.epochs(most + 1))
    assert num_steps(order, 10, run.trainer, run.data) == max(1, most // 4)


def test_repeat_draws_epochs_times_all_rows() -> None:
    run = run_of([0.5, 0.5], epochs=2)
    order = training_order(run, LENGTHS)
    assert num_steps(order, 10, run.trainer, run.data) == 5
    said = order_words(run, order, LENGTHS, 5)
    assert said == (
        "; blend by samples: 0 4 examples, weight 0.5, 2.50 epochs; 1 6 examples, weight 0.5, 1.67 epochs"
    )
    assert order_words(run_of([]), Shuffled(10, seed=0), LENGTHS, 5) == ""
