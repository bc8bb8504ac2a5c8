"""The order of items: a function of seed and consumed samples alone, whatever the data-parallel size or micro batch.

An `Order` is an endless stream of items. The plain one is one shuffled epoch after another; every epoch holds each item once, and a
global batch may lie across two epochs. `asft_nemo.data.blend` and `asft_nemo.data.grouping` have others. Global batch b is the stream's
positions [b G, (b + 1) G); of it, data-parallel rank r takes as its i-th micro batch the M positions from b G + (i R + r) M on (R ranks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from asft_nemo.data.dataset import FILLER


class Order(Protocol):
    """Which item stands where in the endless stream of training items."""

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Indices of the items at these positions of the stream, int64. Cheap wherever the positions are."""
        ...


class Shuffled:
    """One shuffled epoch after another.

    Args:
        num_samples: items of an epoch.
        seed: of the shuffles.
        stream: tells the streams of one seed apart; None for the only one.

    Raises:
        ValueError: there is no item.
    """

    def __init__(self, num_samples: int, *, seed: int, stream: int | None = None):
        if num_samples < 1:
            raise ValueError("no samples to draw from")
        self.num_samples, self._seed, self._stream = num_samples, seed, stream
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Order.at`."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        items = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            there = epochs == epoch
            items[there] = self._epoch(epoch)[places[there]]
        return items

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # two: a step that is looked up ahead may be of the next epoch
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._arranged(epoch)
        return self._epochs[epoch]

    def _arranged(self, epoch: int) -> np.ndarray:
        """The items of an epoch in their order."""
        return epoch_order(self.num_samples, seed=self._seed, epoch=epoch, stream=self._stream)


@dataclass(frozen=True)
class _Share:
    """Which part of a global batch a data-parallel rank takes; sizes in examples."""

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank={self.dp_rank} is not a rank of dp_size={self.dp_size}")
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ValueError(f"the global batch does not divide into micro batches: {self}")

    def micro_batches(self, start: int) -> Iterator[range]:
        """Stream positions of this rank's micro batches of the global batch that starts at `start`."""
        size = self.micro_batch_size
        for i in range(self.global_batch_size // (size * self.dp_size)):
            first = start + (i * self.dp_size + self.dp_rank) * size
            yield range(first, first + size)


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless micro batches of item indices for one data-parallel rank, from `consumed_samples` on.

    Args:
        order: the stream of items.
        consumed_samples: items consumed by all ranks before; the whole state of the order.
        micro_batch_size, global_batch_size: items.
        dp_rank, dp_size: this rank's place.
    """

    def __init__(
        self,
        order: Order,
        *,
        consumed_samples: int = 0,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ):
        if consumed_samples % global_batch_size:
            raise ValueError(
                f"consumed_samples={consumed_samples} is not a multiple of "
                f"global_batch_size={global_batch_size}"
            )
        self._order, self._consumed = order, consumed_samples
        self._share = _Share(micro_batch_size, global_batch_size, dp_rank, dp_size)

    def of_step(self, consumed_samples: int) -> list[int]:
        """This rank's item indices of the global batch after `consumed_samples`, in the order they are taken."""
        return [index for batch in self._micro_batches(consumed_samples) for index in batch]

    def __iter__(self) -> Iterator[list[int]]:
        start = self._consumed
        while True:
            yield from self._micro_batches(start)
            start += self._share.global_batch_size

    def _micro_batches(self, start: int) -> Iterator[list[int]]:
        batches = list(self._share.micro_batches(start))
        items = self._order.at(np.concatenate([np.arange(one.start, one.stop) for one in batches]))
        yield from items.reshape(len(batches), -1).tolist()


class SequentialBatchSampler(Sampler[list[int]]):
    """One pass in file order; the last global batch is filled up with filler items (index -1).

    Args:
        num_samples: examples in the dataset.
        micro_batch_size, global_batch_size: examples.
        dp_rank, dp_size: this rank's place.
    """

    def __init__(
        self, num_samples: int, *, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int
    ):
        self._num_samples = num_samples
        self._share = _Share(micro_batch_size, global_batch_size, dp_rank, dp_size)
        self.num_global_batches = math.ceil(num_samples / global_batch_size)

    def __len__(self) -> int:
        share = self._share
        return self.num_global_batches * (share.global_batch_size // (share.micro_batch_size * share.dp_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_global_batches):
            for positions in self._share.micro_batches(batch * self._share.global_batch_size):
                yield [place if place < self._num_samples else FILLER for place in positions]


def epoch_order(num_samples: int, *, seed: int, epoch: int, stream: int | None = None) -> np.ndarray:
    """The items of one epoch in their order, int64 [num_samples]; `stream` tells the streams of one seed apart."""
    # numpy promises that the bits of a generator never change, but not that its permutations do not.
    # To its seeds, trailing zeros are nothing: stream 0 would have the order of no stream.
    entropy = [seed, epoch] if stream is None else [seed, epoch, stream + 1]
    keys = np.random.PCG64(entropy).random_raw(num_samples)
    return np.argsort(keys, kind="stable")
