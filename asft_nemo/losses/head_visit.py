"""Visiting the head chunk by chunk: logits of a few tokens, their statistics, their gradients, the next.

A visit holds at most two [chunk, V] buffers in the accumulation dtype, reused by every chunk, and never
logits of all tokens; a third without the Triton kernels in the reverse direction and, on a GPU, in the forward one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.losses.chunks import token_chunks
from asft_nemo.losses.head_gemm import (
    add_head_gradient,
    gradient_dtype,
    hidden_gradient_into,
    logits_into,
)
from asft_nemo.losses.logit_grad import logit_gradient
from asft_nemo.losses.per_token import ValidTokens
from asft_nemo.losses.reduce import metric_names, token_losses
from asft_nemo.losses.statistics import (
    Exponentials,
    RawLogits,
    TokenStatistics,
    combine,
    exchange,
    floats_per_token,
    local_statistics,
    probabilities,
    scratch_for,
)
from asft_nemo.losses.vocab_shard import VocabShard
from asft_nemo.objectives import Objective


@dataclass(frozen=True)
class HeadOperands:
    """What is multiplied: hidden states of all T tokens, this rank's rows of the heads, padded ones too."""

    hidden_TH: Tensor
    head_VH: Tensor
    ref_hidden_TH: Tensor | None
    ref_head_VH: Tensor | None


@dataclass
class Gradients:
    """Where a visit leaves its gradients; None where one is not wanted.

    Attributes:
        hidden_NH: of the valid tokens, accumulation dtype; every row is overwritten. A partial sum over this
            rank's vocabulary rows until it is reduced over the group.
        head_VH: added to, any float dtype, padded rows included and left alone.
    """

    hidden_NH: Tensor | None
    head_VH: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    tokens: slice
    hidden_NH: Tensor
    logits_NV: Tensor
    ref_logits_NV: Tensor | None
    own_N: Tensor
    label_index_N: Tensor
    scratch_NV: Tensor | None


@dataclass(frozen=True)
class HeadVisit:
    """The head's work for one micro batch.

    Attributes:
        operands: hidden states and heads.
        tokens: the valid tokens; only these reach the head.
        objective, shard: which loss, and which vocabulary rows.
        chunk_tokens: tokens per chunk.
        dtype: of logits, statistics and gradients' sums: fp32, or fp64.
    """

    operands: HeadOperands
    tokens: ValidTokens
    objective: Objective
    shard: VocabShard
    chunk_tokens: int
    dtype: torch.dtype

    def _rows(self, hidden_TH: Tensor, chunk: slice) -> Tensor:
        if self.tokens.everything_valid:
            return hidden_TH[chunk]
        return hidden_TH.index_select(0, self.tokens.index_N[chunk])

    def _chunks(self) -> Iterator[_Chunk]:
        """Logits of both models chunk by chunk, in buffers that the next chunk overwrites."""
        valid = self.shard.num_valid
        operands, anchored = self.operands, self.objective.divergence is not None
        shape = (min(self.chunk_tokens, self.tokens.count), valid)
        buffers = [operands.hidden_TH.new_empty(shape, dtype=self.dtype) for _ in range(2 if anchored else 1)]
        scratch = scratch_for(self.objective, buffers[0])
        for chunk in token_chunks(self.tokens.count, self.chunk_tokens):
            views = [buffer[: chunk.stop - chunk.start] for buffer in buffers]
            hidden_NH = self._rows(operands.hidden_TH, chunk)
            logits_into(views[0], hidden_NH, operands.head_VH[:valid])
            if anchored:
                assert operands.ref_hidden_TH is not None
                assert operands.ref_head_VH is not None
                logits_into(views[1], self._rows(operands.ref_hidden_TH, chunk), operands.ref_head_VH[:valid])
            yield _Chunk(
                chunk,
                hidden_NH,
                views[0],
                views[1] if anchored else None,
                *self.shard.local_index(self.tokens.labels_N[chunk]),
                None if scratch is None else scratch[: chunk.stop - chunk.start],  # or the few rows it has
            )

    def _local_statistics(self, chunk: _Chunk) -> tuple[Tensor, Exponentials | RawLogits]:
        """This rank's statistics of a chunk, and what they leave behind for its gradient."""
        return local_statistics(
            self.objective,
            chunk.logits_NV,
            chunk.ref_logits_NV,
            chunk.own_N,
            chunk.label_index_N,
            chunk.scratch_NV,
        )

    def _add_gradients(
        self,
        chunk: _Chunk,
        left: Exponentials | RawLogits,
        statistics: TokenStatistics,
        weight_N: Tensor,
        upstream_N: Tensor | None,
        into: Gradients,
    ) -> None:
        """The chunk's logit gradient, from what its statistics left behind, and both products with it."""
        gradient_NV = logit_gradient(
            self.objective,
            left,
            statistics,
            weight_N,
            chunk.own_N,
            chunk.label_index_N,
            upstream_N,
            gradient_dtype(chunk.hidden_NH, self.operands.head_VH, into.head_VH, self.dtype),
        )
        if into.hidden_NH is not None:
            head_VH = self.operands.head_VH[: self.shard.num_valid]
            hidden_gradient_into(into.hidden_NH[chunk.tokens], gradient_NV, head_VH)
        if into.head_VH is not None:
            add_head_gradient(into.head_VH[: self.shard.num_valid], gradient_NV, chunk.hidden_NH)

    def statistics(self) -> TokenStatistics:
        """Statistics of all valid tokens. GEMMs: one a model. One all-gather a chunk."""
        parts = [
            exchange(self.objective, self._local_statistics(chunk)[0], self.shard) for chunk in self._chunks()
        ]
        if not parts:
            shape = (1, 0, floats_per_token(self.objective))
            return combine(self.objective, self.operands.hidden_TH.new_empty(shape, dtype=self.dtype))
        return TokenStatistics.concatenate(parts)

    def gradients(
        self, statistics: TokenStatistics, weight_N: Tensor, upstream_N: Tensor | None, into: Gradients
    ) -> None:
        """Gradients, the statistics and weights known. GEMMs: one a model and one a gradient."""
        for chunk in self._chunks():
            part = statistics[chunk.tokens]
            left = probabilities(self.objective, chunk.logits_NV, chunk.ref_logits_NV, part)
            upstream = upstream_N if upstream_N is None or upstream_N.ndim == 0 else upstream_N[chunk.tokens]
            self._add_gradients(chunk, left, part, weight_N[chunk.tokens], upstream, into)

    def loss_and_gradients(self, upstream: Tensor | None, into: Gradients) -> tuple[Tensor, Tensor]:
        """Loss sum, metrics [M, N] and gradients in one visit. GEMMs: one a model and one a gradient.

        One all-gather a chunk. Only for token scope: a token's weight is known as soon as its statistics are.
        """
        loss_sum = self.operands.hidden_TH.new_zeros((), dtype=self.dtype)
        metrics_MN = loss_sum.new_empty(len(metric_names(self.objective)), self.tokens.count)
        for chunk in self._chunks():
            packed_NK, left = self._local_statistics(chunk)
            part = exchange(self.objective, packed_NK, self.shard)
            loss_N, weight_N, metrics_MN[:, chunk.tokens] = token_losses(
                self.objective, part, self.tokens, chunk.tokens
            )
            loss_sum += loss_N.sum()
            self._add_gradients(chunk, left, part, weight_N, upstream, into)
        return loss_sum, metrics_MN
