"""The order of examples: a function of seed and consumed samples alone, whatever the data-parallel size or
micro batch.

The stream of samples is one shuffled epoch after another; every epoch holds each example once, and a global
batch may lie across two epochs. Global batch b is the stream's positions [b G, (b + 1) G); of it,
data-parallel rank r takes as its i-th micro batch the M positions from b G + (i R + r) M on (R ranks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from asft_nemo.config.schema import TrainerConfig
from asft_nemo.data.dataset import FILLER


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
    """Endless micro batches of example indices for one data-parallel rank, from `consumed_samples` on.

    Args:
        num_samples: examples in the dataset.
        seed: of the shuffles.
        consumed_samples: examples consumed by all ranks before; the whole state of the order.
        micro_batch_size, global_batch_size: examples.
        dp_rank, dp_size: this rank's place.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        consumed_samples: int = 0,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ):
        if num_samples < 1:
            raise ValueError("no samples to draw from")
        if consumed_samples % global_batch_size:
            raise ValueError(
                f"consumed_samples={consumed_samples} is not a multiple of "
                f"global_batch_size={global_batch_size}"
            )
        self._num_samples, self._seed, self._consumed = num_samples, seed, consumed_samples
        self._share = _Share(micro_batch_size, global_batch_size, dp_rank, dp_size)
        self._epoch: int | None = None
        self._order = np.empty(0, dtype=np.int64)

    def of_step(self, consumed_samples: int) -> list[int]:
        """This rank's example indices of the global batch after `consumed_samples`, in the order they are taken."""
        batches = self._share.micro_batches(consumed_samples)
        return [self._sample_at(position) for positions in batches for position in positions]

    def __iter__(self) -> Iterator[list[int]]:
        start = self._consumed
        while True:
            for positions in self._share.micro_batches(start):
                yield [self._sample_at(position) for position in positions]
            start += self._share.global_batch_size

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, self._num_samples)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._num_samples, seed=self._seed, epoch=epoch)
        return int(self._order[place])


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


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch in their order, int64 [num_samples]."""
    # numpy promises that the bits of a generator never change, but not that its permutations do not.
    keys = np.random.PCG64([seed, epoch]).random_raw(num_samples)
    return np.argsort(keys, kind="stable")


def num_steps(num_samples: int, trainer: TrainerConfig) -> int:
    """Optimizer steps of a run: `max_steps` where given, else the epochs in global batches, rounded up.

    Args:
        num_samples: examples in the training dataset.
        trainer: the run's trainer section.
    """
    if trainer.max_steps is not None:
        return trainer.max_steps
    return max(1, math.ceil(trainer.epochs * num_samples / trainer.global_batch_size))
