"""Batches of similar lengths: less padding, without packing.

An epoch is shuffled, cut into chunks of 50 global batches, sorted by length inside each chunk, and cut into global batches, which are
shuffled again. Inside a global batch the longest items come first. So the items of a micro batch are of similar length, and it is padded to
its longest only. Which items a global batch holds is a function of seed, position and global batch size alone; the loss is divided by the
tokens of the global batch, so how they are padded changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from asft_nemo.data.sampler import Shuffled, epoch_order

CHUNK = 50  # global batches sorted together
_BATCHES = 0  # the stream of the second shuffle


class GroupedByLength(Shuffled):
    """An `asft_nemo.data.sampler.Order` whose global batches hold items of similar lengths, the longest first.

    Every epoch holds each item once. Where its size is no multiple of the global batch, the last batch of an epoch and the first of the next
    are one, of items of any length.

    Args:
        lengths: of the items, in tokens.
        seed: of the shuffles.
        global_batch_size: items.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, global_batch_size: int):
        super().__init__(len(lengths), seed=seed)
        self._lengths, self._size = np.asarray(lengths), global_batch_size

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `asft_nemo.data.sampler.Order.at`."""
        numbers, places = np.divmod(np.asarray(positions, dtype=np.int64), self._size)
        batches = np.unique(numbers)
        items = super().at(batches[:, None] * self._size + np.arange(self._size))
        by_length = np.argsort(-self._lengths[items], axis=1, kind="stable")
        return np.take_along_axis(items, by_length, axis=1)[np.searchsorted(batches, numbers), places]

    def _arranged(self, epoch: int) -> np.ndarray:
        """First what fills up the batch that the epoch before began, then whole batches, then the beginning of one."""
        order = super()._arranged(epoch)
        first = min(-epoch * self.num_samples % self._size, self.num_samples)
        count = (self.num_samples - first) // self._size
        whole = order[first : first + count * self._size]
        step = CHUNK * self._size
        chunks = [self._sorted(whole[start : start + step]) for start in range(0, len(whole), step)]
        if chunks:
            shuffle = epoch_order(count, seed=self._seed, epoch=epoch, stream=_BATCHES)
            whole = np.concatenate(chunks).reshape(count, self._size)[shuffle].reshape(-1)
        return np.concatenate([order[:first], whole, order[first + count * self._size :]])

    def _sorted(self, items: np.ndarray) -> np.ndarray:
        return items[np.argsort(-self._lengths[items], kind="stable")]

    def used(self, micro_batch_size: int, *, multiple_of: int, sequence_length: int) -> float:
        """Share of the places of the first epoch's micro batches that hold a token; see `padded_lengths` for the arguments."""
        step, tokens, places = CHUNK * self._size, 0, 0
        end = math.ceil(self.num_samples / self._size) * self._size
        for start in range(0, end, step):  # in chunks, which bounds the memory
            items = self.at(np.arange(start, min(start + step, end)))
            lengths = self._lengths[items].reshape(-1, micro_batch_size)
            widths = padded_lengths(
                lengths.max(axis=1), multiple_of=multiple_of, sequence_length=sequence_length
            )
            tokens, places = tokens + int(lengths.sum()), places + int(widths.sum()) * micro_batch_size
        return tokens / places


def padded_lengths(longest: np.ndarray, *, multiple_of: int, sequence_length: int) -> np.ndarray:
    """Tokens of every row of a micro batch.

    Args:
        longest: tokens of its longest item.
        multiple_of: what the layout and its kernels want.
        sequence_length: the most.
    """
    return np.minimum(-(-longest // multiple_of) * multiple_of, sequence_length)


class PaddedToLongest(Dataset[dict[str, Tensor]]):
    """Items for a loader that takes a micro batch at once: each is cut to what the longest of the micro batch needs.

    What is cut off is padding on the right, which no token sees.

    Args:
        items: of one fixed length, with `lengths`.
        multiple_of: see `padded_lengths`.
    """

    def __init__(self, items: Any, *, multiple_of: int):
        self.items, self._multiple = items, multiple_of
        self._lengths = np.asarray(items.lengths)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        longest, size = self._lengths[list(indices)].max(), self.items.sequence_length
        width = int(padded_lengths(longest, multiple_of=self._multiple, sequence_length=size))
        return [
            {key: value[:width] if value.ndim else value for key, value in self.items[index].items()}
            for index in indices
        ]
