"""Several examples in one row: first-fit-decreasing, and the items that come of it.

A packed row holds whole examples one after another. Each is a segment: positions begin at 0 again, and attention must not look across
(`asft_nemo.nemo.packed_attention`). Which examples share a row depends on their lengths and order, and on what their lengths are rounded
up to: not on the seed or the epoch, and on no other part of the layout than the context-parallel size.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

FILLER = -1  # index (and sample id) of an item without any learned token
_TENSORS = ("tokens", "labels", "loss_mask", "position_ids")


class Examples(Protocol):
    """What can be packed: items of `SupervisedDataset`, and how much of each is not padding."""

    sequence_length: int

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of every item, int64 [items]."""
        ...

    @property
    def sample_ids(self) -> np.ndarray:
        """The id of every item, int64 [items]."""
        ...

    def learned_tokens(self, sample_ids: Iterable[int]) -> int:
        """Labels that count in the examples of these ids."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of item indices: the longest items first, each into the first row that has room.

    Items of equal length keep their order. At most 11/9 of the fewest rows possible, and one more (Johnson, 1973).

    Args:
        lengths: of the items, each between 1 and `capacity`.
        capacity: of a row.

    Raises:
        ValueError: an item is empty or does not fit.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"items of {sizes.min()} to {sizes.max()} tokens do not fit rows of {capacity}")
    rows: list[list[int]] = []
    open_rows = _OpenRows(capacity)
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        row = open_rows.take_first(size)
        if row is None:
            row = len(rows)
            rows.append([])
            open_rows.put(row, capacity - size)
        rows[row].append(index)
    return rows


class _OpenRows:
    """Rows by the room they have; finds the first with enough of it in log(capacity) steps.

    A heap of rows for each room, and a tree over the rooms whose nodes hold the first row below them.
    """

    def __init__(self, capacity: int):
        self._leaves = 1 << capacity.bit_length()
        self._nothing = sys.maxsize
        self._first = [self._nothing] * (2 * self._leaves)
        self._heaps: dict[int, list[int]] = {}
        self._room: list[int] = []

    def put(self, row: int, room: int) -> None:
        """Adds the next row, or gives a row that was taken its new room."""
        if row == len(self._room):
            self._room.append(room)
        self._room[row] = room
        if room:
            heapq.heappush(self._heaps.setdefault(room, []), row)
            self._update(room)

    def take_first(self, size: int) -> int | None:
        """Puts `size` into the first row with room for it; None where there is none."""
        low, high, row = self._leaves + size, 2 * self._leaves, self._nothing
        while low < high:  # the end of the leaves, a power of two: nothing is left over on that side
            if low & 1:
                row = min(row, self._first[low])
                low += 1
            low, high = low >> 1, high >> 1
        if row == self._nothing:
            return None
        room = self._room[row]
        heapq.heappop(self._heaps[room])
        self._update(room)
        self.put(row, room - size)
        return row

    def _update(self, room: int) -> None:
        heap, node = self._heaps[room], self._leaves + room
        self._first[node] = heap[0] if heap else self._nothing
        while node := node >> 1:
            self._first[node] = min(self._first[2 * node], self._first[2 * node + 1])


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of several examples.

    An item has `tokens`, `labels`, `position_ids` int64 [S] and `loss_mask` bool [S] as in `SupervisedDataset`, positions counted anew in
    each example; `segment_ids` int64 [S], the example's number in the row, padding having one of its own; `sample_id` int64 [S], the
    example of each token, -1 for padding; `domain_id`, int64 scalar: examples of two files never share a row. Index -1 is a row of padding.

    With `multiple_of` a segment is its example and padding up to the next multiple, on the right, where no token of the example sees it.
    Context parallelism cuts each segment into equal parts (`asft_nemo.data.context_slices`).

    Args:
        examples: what is packed.
        multiple_of: segments are of multiples of this many tokens; `sequence_length` is one.

    Raises:
        ValueError: `sequence_length` is none.
    """

    def __init__(self, examples: Examples, *, multiple_of: int = 1):
        self.examples, self.sequence_length = examples, examples.sequence_length
        if self.sequence_length % multiple_of:
            raise ValueError(f"rows of {self.sequence_length} tokens hold no multiples of {multiple_of}")
        lengths = np.asarray(examples.lengths)
        self._segments = -(-lengths // multiple_of) * multiple_of
        domains = np.asarray(getattr(examples, "domain_ids", np.zeros(len(lengths), dtype=np.int64)))
        self.rows: list[list[int]] = []
        for domain in np.unique(domains).tolist():
            members = np.flatnonzero(domains == domain)
            packed = first_fit_decreasing(self._segments[members], self.sequence_length)
            self.rows += [sorted(members[row].tolist()) for row in packed]
        self._tokens = int(lengths.sum())
        self._lengths = lengths

    def __getattr__(self, name: str) -> Any:
        """What the examples know and packing does not change, for example `report`."""
        if name.startswith("_") or name == "examples":
            raise AttributeError(name)
        return getattr(self.examples, name)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return self._tokens / (len(self.rows) * self.sequence_length)

    @property
    def sample_ids(self) -> np.ndarray:
        """The ids of all examples, int64 [examples], row by row."""
        return self.ids_of(range(len(self.rows)))

    def ids_of(self, indices: Iterable[int]) -> np.ndarray:
        """The ids of the examples in some rows, int64, in order."""
        members = [index for row in indices for index in self.rows[row]]
        return np.asarray(self.examples.sample_ids)[members]

    def rows_with(self, sample_ids: Iterable[int]) -> list[int]:
        """Indices of the rows that hold any of these examples."""
        wanted = set(sample_ids)
        return [
            number
            for number in range(len(self.rows))
            if not wanted.isdisjoint(self.ids_of([number]).tolist())
        ]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        padding = self.examples[FILLER]
        item = {key: padding[key].clone() for key in _TENSORS}
        item["segment_ids"] = torch.zeros(self.sequence_length, dtype=torch.int64)
        item["sample_id"] = torch.full((self.sequence_length,), FILLER, dtype=torch.int64)
        item["domain_id"] = padding["domain_id"].clone() if "domain_id" in padding else torch.tensor(FILLER)
        if index == FILLER:
            return item
        start = 0
        for segment, member in enumerate(self.rows[index]):
            example, stop = self.examples[member], start + int(self._segments[member])
            for key in _TENSORS:  # an example is padded beyond its length, and nothing of that is learned
                item[key][start:stop] = example[key][: stop - start]
            item["segment_ids"][start:stop] = segment
            item["sample_id"][start : start + int(self._lengths[member])] = example["sample_id"]
            item["domain_id"] = example.get("domain_id", item["domain_id"])
            start = stop
        item["segment_ids"][start:] = len(self.rows[index])
        item["position_ids"][start:] = torch.arange(self.sequence_length - start)
        return item
