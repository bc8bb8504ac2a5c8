"""A few rows at a time, where a CPU's cache can hold them: elementwise work then reads memory once, not once an operation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

#: Bytes of one block of one [N, V] buffer; two or three of them are in use at a time, and should fit a core's second-level cache.
_BLOCK_BYTES = 512 * 2**10


def rows_per_block(like_NV: Tensor) -> int:
    """Rows of a block on a CPU, at least one; on a GPU all N rows (one kernel launch each is what costs there)."""
    rows, columns = like_NV.shape
    if like_NV.is_cuda:
        return max(rows, 1)
    return max(_BLOCK_BYTES // max(columns * like_NV.itemsize, 1), 1)


def row_blocks(like_NV: Tensor) -> Iterator[slice]:
    """Slices that cover the rows in order; none where there are no rows."""
    step = rows_per_block(like_NV)
    for start in range(0, like_NV.shape[0], step):
        yield slice(start, min(start + step, like_NV.shape[0]))
