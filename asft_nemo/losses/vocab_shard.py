"""Which rows of the vocabulary this rank holds, and the collectives over the ranks that hold the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from asft_nemo.errors import LayoutError


def _collective(*names: str) -> Callable[..., object]:
    """The first of these functions that torch.distributed has."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


_all_reduce = _collective("all_reduce")
# torch 2.13 deprecates the second names; the older torch of NVIDIA's containers knows only those.
_all_gather = _collective("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")


@dataclass(frozen=True)
class VocabShard:
    """Rows [rank * size, (rank + 1) * size) of a vocabulary padded to world_size * size rows.

    Build it with `full` or `of_rank`. The padding is at the end, so the rows that count are a
    prefix of every shard: `num_valid` of its `size` rows, possibly none.

    Attributes:
        rank: this rank's place in the tensor-parallel group.
        world_size: ranks of that group.
        size: rows per rank, padded rows included.
        vocab_size: rows that count, over all ranks.
        group: the tensor-parallel process group; None with one rank.
        sequence_parallel: hidden states hold this rank's T / world_size rows (used by `fused_linear_loss`
            only).
    """

    rank: int
    world_size: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @classmethod
    def full(cls, vocab_size: int) -> VocabShard:
        """The whole vocabulary on this rank, nothing padded."""
        return cls.of_rank(0, 1, vocab_size, vocab_size, None)

    @classmethod
    def of_rank(
        cls,
        rank: int,
        world_size: int,
        padded_vocab_size: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool = False,
    ) -> VocabShard:
        """This rank's rows of a vocabulary of `vocab_size` rows padded to `padded_vocab_size`.

        Raises:
            LayoutError: the padded vocabulary does not divide over the ranks or is smaller than the
                vocabulary, or several ranks have no group.
        """
        if padded_vocab_size < vocab_size or vocab_size < 1 or padded_vocab_size % world_size:
            raise LayoutError(
                f"a vocabulary of {vocab_size} rows padded to {padded_vocab_size} does not fit tensor "
                f"parallel size {world_size}: pad it to a multiple of {world_size} of at least "
                f"{max(vocab_size, 1)}"
            )
        if not 0 <= rank < world_size:
            raise LayoutError(
                f"rank {rank} is not in a group of {world_size}: pass the rank within the group"
            )
        if world_size > 1 and group is None:
            raise LayoutError(f"a vocabulary over {world_size} ranks needs their process group: pass group=")
        return cls(rank, world_size, padded_vocab_size // world_size, vocab_size, group, sequence_parallel)

    @property
    def start(self) -> int:
        """The first vocabulary row of this rank."""
        return self.rank * self.size

    @property
    def num_valid(self) -> int:
        """Rows of this shard that count: its first `num_valid`; the others are padding."""
        return min(max(self.vocab_size - self.start, 0), self.size)

    @property
    def num_valid_of_largest(self) -> int:
        """Rows that count on the rank that has most of them (the first); equal on all ranks."""
        return min(self.vocab_size, self.size)

    def check_rows(self, rows: int, what: str) -> None:
        """Raises LayoutError where a tensor does not have this shard's rows."""
        if rows != self.size:
            raise LayoutError(
                f"{what} has {rows} vocabulary rows on rank {self.rank}, its shard has {self.size}: "
                f"pass the rank's own slice and a shard made with the same padded vocabulary size"
            )

    def local_index(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where each label lies in this shard.

        Returns:
            own_N, bool: the label is one of this rank's rows; index_N, int64: its row here, 0 where it is
                not.
        """
        local_N = labels_N - self.start
        own_N = (local_N >= 0) & (local_N < self.num_valid)
        return own_N, torch.where(own_N, local_N, torch.zeros_like(local_N))

    def all_gather(self, packed_NK: Tensor) -> Tensor:
        """[N, K] of every rank as [R, N, K], in rank order. One all-gather. Not differentiable."""
        if self.world_size == 1:
            return packed_NK.unsqueeze(0)
        return self._gather(packed_NK).view(self.world_size, *packed_NK.shape)

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks, in place. One all-reduce, nothing with one rank. Not differentiable."""
        if self.world_size > 1:
            _all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def gather_rows(self, rows_SH: Tensor) -> Tensor:
        """The T / R rows of every rank as T rows, in rank order. One all-gather. Not differentiable."""
        return rows_SH if self.world_size == 1 else self._gather(rows_SH)

    def reduce_scatter_rows(self, rows_TH: Tensor) -> Tensor:
        """T rows summed over the ranks; each keeps its T / R. One reduce-scatter. Not differentiable."""
        if self.world_size == 1:
            return rows_TH
        scattered = rows_TH.new_empty(rows_TH.shape[0] // self.world_size, *rows_TH.shape[1:])
        _reduce_scatter(scattered, rows_TH.contiguous(), op=dist.ReduceOp.SUM, group=self.group)
        return scattered

    def _gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        _all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered
