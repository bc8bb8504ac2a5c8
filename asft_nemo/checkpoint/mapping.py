"""Two-way mappings between Megatron's tensors and Hugging Face's, as lists of row segments.

Every difference between the two namings is a rearrangement of rows: Megatron row r of a tensor is row h of
one of the Hugging Face tensors it is made of. A mapping therefore only lists its `Segment`s in Megatron's row
order, and both directions, for whole tensors or for any range of rows, follow from that list. So a converter
never needs more than one block of rows in memory, and the way back is exact by construction.

A row is everything under one index of the first dim: a vector of the hidden size in a matrix, one number in a
bias.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

LAYER = "{layer}"


@dataclass(frozen=True)
class Segment:
    """A run of consecutive rows that stay together.

    Attributes:
        hf_name: the Hugging Face tensor (a name with `{layer}` where there is one per layer).
        hf_row: first row in that tensor.
        row: first row in Megatron's tensor.
        rows: how many.
    """

    hf_name: str
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class TensorMapping(ABC):
    """One Megatron tensor (one per layer, where `per_layer`) and the Hugging Face tensors it is made of.

    Attributes:
        megatron: name on disk, without the `module.` prefix; a per-layer tensor is stacked `[num_layers,
            ...]` there.
        per_layer: one slice per transformer layer.
        row_shape: shape of one row; empty for a bias or a norm weight.
    """

    megatron: str
    per_layer: bool = True
    row_shape: tuple[int, ...] = ()

    @abstractmethod
    def parts(self) -> Iterator[tuple[str, int, int]]:
        """Yields (Hugging Face name, first row there, rows) in Megatron's row order."""

    def segments(self) -> tuple[Segment, ...]:
        """Returns the segments in Megatron's row order, without gaps."""
        result: list[Segment] = []
        row = 0
        for hf_name, hf_row, rows in self.parts():
            result.append(Segment(hf_name=hf_name, hf_row=hf_row, row=row, rows=rows))
            row += rows
        return tuple(result)

    @property
    def rows(self) -> int:
        """Rows of one layer's Megatron tensor."""
        return sum(rows for _, _, rows in self.parts())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer's Megatron tensor."""
        return (self.rows, *self.row_shape)

    @property
    def row_numel(self) -> int:
        """Numbers in one row."""
        return math.prod(self.row_shape)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every Hugging Face tensor, by name, in the order they first appear."""
        rows: dict[str, int] = {}
        for hf_name, _, count in self.parts():
            rows[hf_name] = rows.get(hf_name, 0) + count
        return {hf_name: (count, *self.row_shape) for hf_name, count in rows.items()}


@dataclass(frozen=True, kw_only=True)
class Copy(TensorMapping):
    """The same tensor under another name."""

    hf: str
    num_rows: int

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """Yields the one whole tensor."""
        yield self.hf, 0, self.num_rows


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Copy):
    """Embedding or head, of which Megatron may hold more rows than the vocabulary has.

    The padding rows mean nothing and are cropped on the way to Hugging Face. Import writes the vocabulary
    alone; Megatron itself fills the rows it asks for beyond that with zeros.
    """


@dataclass(frozen=True, kw_only=True)
class GatedMLP(TensorMapping):
    """`linear_fc1` is the gate's rows followed by the up projection's: the gate is Megatron's first half."""

    gate: str
    up: str
    ffn_hidden_size: int

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """Yields the two halves."""
        yield self.gate, 0, self.ffn_hidden_size
        yield self.up, 0, self.ffn_hidden_size


class Heads(TypedDict):
    """The three sizes of `InterleavedQKV`, which a weight and its bias share."""

    num_attention_heads: int
    num_query_groups: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class InterleavedQKV(TensorMapping):
    """`linear_qkv` interleaves by query group: the group's queries, its key, its value, then the next group.

    Weights and biases are rearranged alike; a bias has an empty `row_shape`.
    """

    query: str
    key: str
    value: str
    num_attention_heads: int
    num_query_groups: int
    head_dim: int

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """Yields three runs of rows per query group."""
        query_rows = self.num_attention_heads // self.num_query_groups * self.head_dim
        for group in range(self.num_query_groups):
            yield self.query, group * query_rows, query_rows
            yield self.key, group * self.head_dim, self.head_dim
            yield self.value, group * self.head_dim, self.head_dim


@dataclass(frozen=True)
class RowRun:
    """A run of rows to read from one tensor into the block being assembled.

    Attributes:
        name: tensor to read from.
        start: first row there.
        into: first row in the block.
        rows: how many.
    """

    name: str
    start: int
    into: int
    rows: int


def hf_runs(segments: tuple[Segment, ...], start: int, stop: int) -> list[RowRun]:
    """Returns what to read from Hugging Face's tensors for Megatron's rows `start:stop`."""
    runs: list[RowRun] = []
    for segment in segments:
        low, high = max(start, segment.row), min(stop, segment.row + segment.rows)
        if low < high:
            hf_row = segment.hf_row + low - segment.row
            runs.append(RowRun(name=segment.hf_name, start=hf_row, into=low - start, rows=high - low))
    return runs


def megatron_runs(
    segments: tuple[Segment, ...], hf_name: str, start: int, stop: int, *, megatron: str
) -> list[RowRun]:
    """Returns what to read from Megatron's tensor for rows `start:stop` of Hugging Face's `hf_name`."""
    runs: list[RowRun] = []
    for segment in segments:
        low, high = max(start, segment.hf_row), min(stop, segment.hf_row + segment.rows)
        if segment.hf_name == hf_name and low < high:
            row = segment.row + low - segment.hf_row
            runs.append(RowRun(name=megatron, start=row, into=low - start, rows=high - low))
    return runs


def row_blocks(rows: int, row_bytes: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields consecutive (start, stop) that cover `rows`, each at most `max_bytes` (at least one row)."""
    step = max(1, max_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
