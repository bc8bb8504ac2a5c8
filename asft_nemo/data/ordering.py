"""Which order a run's items have, how long the run is, and the words for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from asft_nemo.config.fp8 import tokens_multiple
from asft_nemo.config.schema import DataConfig, RunConfig, TrainerConfig
from asft_nemo.data.blend import Blend
from asft_nemo.data.grouping import GroupedByLength
from asft_nemo.data.packing import PackedDataset
from asft_nemo.data.sampler import Order, Shuffled
from asft_nemo.data.sources import domain_names
from asft_nemo.errors import DataError


def training_order(run: RunConfig, train: Any) -> Order:
    """The stream of a run's training items.

    Args:
        run: the settings.
        train: `SupervisedDataset` or `PackedDataset`; of a plain run only its length counts.

    Raises:
        DataError: a weight belongs to a domain without any item.
    """
    if run.data.group_by_length:
        size = run.trainer.global_batch_size
        return GroupedByLength(train.lengths, seed=run.run.seed, global_batch_size=size)
    if not run.data.weights:
        return Shuffled(len(train), seed=run.run.seed)
    members = items_of_domains(train, len(run.data.train))
    for file, items in zip(run.data.train, members, strict=True):
        if not len(items):
            raise DataError(
                f"data.weights has a weight for {file}, of which no example is left: leave it out of data.train"
            )
    return Blend(members, draw_weights(run.data, train, members), seed=run.run.seed)


def items_of_domains(train: Any, count: int) -> list[np.ndarray]:
    """Indices of each domain's items, int64: of examples, or of rows where they are packed."""
    domain_ids = np.asarray(train.domain_ids)
    if isinstance(train, PackedDataset):  # a row's examples are of one domain
        domain_ids = domain_ids[[row[0] for row in train.rows]]
    return [np.flatnonzero(domain_ids == domain) for domain in range(count)]


def draw_weights(data: DataConfig, train: Any, members: Sequence[np.ndarray]) -> list[Fraction]:
    """Each domain's share of the draws: its weight over what a draw of it gives in the mean, in examples or in input tokens."""
    domain_ids = np.asarray(train.domain_ids)
    weights = []
    for domain, (given, items) in enumerate(zip(data.weights, members, strict=True)):
        own = domain_ids == domain
        measure = int(np.asarray(train.lengths)[own].sum()) if data.weights_by == "tokens" else int(own.sum())
        # the decimal that was written, not the binary number next to it
        weights.append(Fraction(repr(given)) * len(items) / measure)
    return weights


def num_steps(order: Order, num_items: int, trainer: TrainerConfig, data: DataConfig) -> int:
    """Optimizer steps of a run: `max_steps` where given, else what `trainer.epochs` means.

    Without weights, and with `when_exhausted=repeat`, an epoch is as many draws as there are items, and the last global batch goes on into
    the next epoch. With `stop` the run ends before a global batch that would draw from any domain more than `epochs` times its items.

    Args:
        order: the stream of the run's training items.
        num_items: of all domains.
        trainer: the run's trainer section.
        data: its data section.
    """
    if trainer.max_steps is not None:
        return trainer.max_steps
    if isinstance(order, Blend) and data.when_exhausted == "stop":
        return max(1, order.positions_within(trainer.epochs) // trainer.global_batch_size)
    return max(1, math.ceil(trainer.epochs * num_items / trainer.global_batch_size))


def padding_multiple(run: RunConfig) -> int | None:
    """What the rows of a micro batch are padded to a multiple of, beyond its longest; None where all rows are `data.sequence_length` long.

    Sequence parallelism cuts a row into equal parts, and tensor cores want 8 tokens in each, those of FP8 16.
    """
    if not run.data.group_by_length:
        return None
    return tokens_multiple(run) * (run.parallel.tp_size if run.parallel.sequence_parallel else 1)


def order_words(run: RunConfig, order: Order, train: Any, max_steps: int) -> str:
    """What the order makes of the items, for the run's summary line; nothing where they are just shuffled."""
    if isinstance(order, GroupedByLength):
        multiple_of, size = padding_multiple(run), run.data.sequence_length
        assert multiple_of is not None
        used = order.used(run.trainer.micro_batch_size, multiple_of=multiple_of, sequence_length=size)
        whole = np.asarray(train.lengths).mean() / size
        return (
            f"; micro batches of similar lengths: {100 * used:.1f} % of their places used, "
            f"{100 * whole:.1f} % at data.sequence_length={size}"
        )
    return _blend_words(run, order, train, max_steps) if isinstance(order, Blend) else ""


def _blend_words(run: RunConfig, order: Blend, train: Any, max_steps: int) -> str:
    epochs = order.epochs(max_steps * run.trainer.global_batch_size)
    examples = np.bincount(np.asarray(train.domain_ids), minlength=len(epochs)).tolist()
    total = math.fsum(run.data.weights)
    words = (
        f"{name} {count} examples, weight {weight / total:.3g}, {seen:.2f} epochs"
        for name, count, weight, seen in zip(
            domain_names(run.data.train), examples, run.data.weights, epochs, strict=True
        )
    )
    return f"; blend by {run.data.weights_by}: {'; '.join(words)}"
