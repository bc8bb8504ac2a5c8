"""The loss over logits whose vocabulary is sharded over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from asft_nemo.losses.chunks import resolve_chunk_tokens, token_chunks
from asft_nemo.losses.logit_grad import logit_gradient
from asft_nemo.losses.per_token import ValidTokens, accumulation_dtype, require_reference, valid_tokens
from asft_nemo.losses.reduce import LossOutput, loss_output, token_losses
from asft_nemo.losses.statistics import (
    TokenStatistics,
    exchange,
    floats_per_token,
    local_statistics,
    probabilities,
)
from asft_nemo.losses.vocab_shard import VocabShard
from asft_nemo.objectives import Objective
from asft_nemo.shapes import LabelsT, LogitsTV, LogProbT, LossMaskT, SegmentIdsT


def _chunk_logits(logits_TV: Tensor, index_N: Tensor, shard: VocabShard, dtype: torch.dtype) -> Tensor:
    """A fresh copy of the chunk's rows and of the columns that count, in the accumulation dtype."""
    return logits_TV[:, : shard.num_valid].index_select(0, index_N).to(dtype)


def _statistics(
    logits_TV: Tensor,
    ref_logits_TV: Tensor | None,
    tokens: ValidTokens,
    objective: Objective,
    shard: VocabShard,
    chunks: list[slice],
) -> TokenStatistics:
    dtype = accumulation_dtype(logits_TV.dtype)
    packed_NK = logits_TV.new_empty(tokens.count, floats_per_token(objective), dtype=dtype)
    for chunk in chunks:
        index_N = tokens.index_N[chunk]
        z_NV = _chunk_logits(logits_TV, index_N, shard, dtype)
        y_NV = None if ref_logits_TV is None else _chunk_logits(ref_logits_TV, index_N, shard, dtype)
        packed_NK[chunk], _ = local_statistics(
            objective, z_NV, y_NV, *shard.local_index(tokens.labels_N[chunk])
        )
    return exchange(objective, packed_NK, shard)


class _VocabParallelLoss(torch.autograd.Function):
    """Statistics in forward, the logit gradient in closed form in backward; metrics have no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits_TV: Tensor,
        ref_logits_TV: Tensor | None,
        tokens: ValidTokens,
        objective: Objective,
        shard: VocabShard,
        chunks: list[slice],
    ) -> tuple[Tensor, Tensor]:
        statistics = _statistics(logits_TV, ref_logits_TV, tokens, objective, shard, chunks)
        loss_N, weight_N, metrics_MN = token_losses(objective, statistics, tokens, slice(None))
        ctx.save_for_backward(logits_TV, ref_logits_TV, weight_N)
        ctx.rest = (statistics, tokens, objective, shard, chunks)
        ctx.mark_non_differentiable(metrics_MN)
        return loss_N.sum(), metrics_MN

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits_TV, ref_logits_TV, weight_N = ctx.saved_tensors
        statistics, tokens, objective, shard, chunks = ctx.rest
        dtype = weight_N.dtype
        gradient_TV = torch.zeros_like(logits_TV)
        for chunk in chunks:
            index_N = tokens.index_N[chunk]
            z_NV = _chunk_logits(logits_TV, index_N, shard, dtype)
            y_NV = None if ref_logits_TV is None else _chunk_logits(ref_logits_TV, index_N, shard, dtype)
            part = statistics[chunk]
            exps = probabilities(objective, z_NV, y_NV, part)
            own_N, label_index_N = shard.local_index(tokens.labels_N[chunk])
            gradient_NV = logit_gradient(
                objective, exps, part, weight_N[chunk], own_N, label_index_N, upstream[0]
            )
            gradient_TV[:, : shard.num_valid].index_copy_(0, index_N, gradient_NV.to(gradient_TV.dtype))
        return gradient_TV, None, None, None, None, None


def vocab_parallel_loss(
    logits_TV: LogitsTV,
    labels_T: LabelsT,
    loss_mask_T: LossMaskT,
    *,
    objective: Objective,
    shard: VocabShard,
    ref_logits_TV: LogitsTV | None = None,
    segment_ids_T: SegmentIdsT | None = None,
    ref_logprob_T: LogProbT | None = None,
    old_logprob_T: LogProbT | None = None,
) -> LossOutput:
    """sum over valid t of (sg(w_t) + c) CE_t + kl_weight * KL_t, from this rank's columns of the logits.

    Args:
        logits_TV: [T, V] this rank's columns of the policy's logits, any float dtype. Columns that count are
            finite; padded ones may hold anything and get zero gradient.
        labels_T, loss_mask_T: int64 and bool [T], the same on all ranks of the group.
        objective: which loss.
        shard: which columns these are.
        ref_logits_TV: this rank's columns of the reference's logits, a constant; ignored where nothing reads
            it.
        segment_ids_T, ref_logprob_T, old_logprob_T: see `dense_loss`.

    Returns:
        `LossOutput`, equal on all ranks: the loss over the whole vocabulary, in fp32 (fp64 for fp64 logits).
        Its gradient on each rank is that of its own columns, exact and without a factor of the group's size.

    Raises:
        DataError, ObjectiveError: see `dense_loss`.
        LayoutError: logits that do not fit the shard.

    Collectives: one all-gather of 3 numbers per valid token (6 with a divergence, 20 more for top-k entropy)
    in forward, none in backward. Memory: the gradient in the logits' dtype, and [chunk, V] buffers in fp32.
    """
    shard.check_rows(logits_TV.shape[1], "the logits tensor")
    require_reference(objective, ref_logits_TV)
    ref_logits = None
    if objective.divergence is not None and ref_logits_TV is not None:
        shard.check_rows(ref_logits_TV.shape[1], "the reference's logits tensor")
        ref_logits = ref_logits_TV.detach()
    tokens = valid_tokens(
        labels_T,
        loss_mask_T,
        objective,
        shard.vocab_size,
        segment_ids_T=segment_ids_T,
        ref_logprob_T=ref_logprob_T,
        old_logprob_T=old_logprob_T,
    )
    chunk_tokens = resolve_chunk_tokens(
        "auto",
        num_tokens=tokens.count,
        objective=objective,
        shard=shard,
        dtype=accumulation_dtype(logits_TV.dtype),
        device=logits_TV.device,
        visits_head=False,
    )
    chunks = list(token_chunks(tokens.count, chunk_tokens))
    loss_sum, metrics_MN = cast(
        tuple[Tensor, Tensor],
        _VocabParallelLoss.apply(logits_TV, ref_logits, tokens, objective, shard, chunks),  # pyright: ignore
    )
    return loss_output(objective, loss_sum, metrics_MN, tokens)
