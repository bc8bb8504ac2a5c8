"""Pinned host memory without what torch's allocator of it loses."""

from __future__ import annotations

import torch
from torch import Tensor

_PAGE = 4096  # bytes


def block_sizes(size: int) -> list[int]:
    """Powers of two, of falling size, that hold `size` bytes together and less than a page more."""
    pages = -(-size // _PAGE)
    return [_PAGE << bit for bit in reversed(range(pages.bit_length())) if pages >> bit & 1]


class PinnedMemory:
    """Host memory for the bytes of many tensors, one behind the other; a tensor may lie in two blocks or more.

    torch rounds a pinned allocation up to a power of two (`CachingHostAllocatorImpl::allocate`, torch 2.13), so tensors that each have their own
    may take twice their bytes: a gate and up projection of 129 MiB takes 256. These blocks are powers of two, which it leaves as they are.

    Args:
        size: bytes of all tensors.
    """

    def __init__(self, size: int):
        self._blocks = [
            torch.empty(length, dtype=torch.uint8, device="cpu", pin_memory=True)
            for length in block_sizes(size)
        ]
        self._free = list(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks)

    def take(self, size: int) -> list[Tensor]:
        """The next `size` bytes, in their order; several tensors where a block ends within them.

        Raises:
            RuntimeError: so many are not left.
        """
        parts: list[Tensor] = []
        while size:
            if not self._free:
                raise RuntimeError(f"{size} bytes more are wanted than this host memory was made for")
            part, rest = self._free[0][:size], self._free[0][size:]
            self._free[:1] = [rest] if rest.nbytes else []
            parts.append(part)
            size -= part.nbytes
        return parts


def bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor as bytes, which stays its view when the storage is freed and made again."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]
