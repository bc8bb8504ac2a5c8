"""The loss straight from hidden states: head, softmax and gradients without [tokens, vocab] logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asft_nemo.losses.chunks import ChunkTokens, resolve_chunk_tokens
from asft_nemo.losses.head_visit import Gradients, HeadOperands, HeadVisit
from asft_nemo.losses.per_token import ValidTokens, accumulation_dtype, require_reference, valid_tokens
from asft_nemo.losses.reduce import LossOutput, loss_output, token_losses
from asft_nemo.losses.vocab_shard import VocabShard
from asft_nemo.objectives import Objective
from asft_nemo.objectives import objective as build_objective
from asft_nemo.shapes import (
    HeadVH,
    HiddenTH,
    LabelsT,
    LogProbT,
    LossMaskT,
    RefHeadVH,
    RefHiddenTH,
    SegmentIdsT,
)


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class HeadGradient:
    """Where the head's gradient is added, instead of being handed to autograd.

    Attributes:
        buffer_VH: [V, H] in any float dtype, such as Megatron's `main_grad`; added to, padded rows left
            alone.
        upstream_scale: the factor the loss sum will be multiplied with before backward, where it is known.
            Then the buffer is added to during the forward visit and no other [V, H] buffer exists; backward
            raises where the factor turns out to be another. None: an fp32 buffer is kept from forward to
            backward.
        returned: called in backward; autograd gets its result as the head's gradient (None for none). A
            framework whose hooks want a gradient to be there gives a dummy; with tied embeddings it must be
            zeros, for autograd adds the embedding's gradient to it.
    """

    buffer_VH: Tensor
    upstream_scale: float | None = None
    returned: Callable[[], Tensor | None] = _nothing


@dataclass(frozen=True)
class _Spec:
    """Everything about a micro batch but the two tensors that have gradients."""

    ref_hidden_TH: Tensor | None
    ref_head_VH: Tensor | None
    tokens: ValidTokens
    objective: Objective
    shard: VocabShard
    chunk_tokens: int
    dtype: torch.dtype
    head_gradient: HeadGradient | None

    def _gather(self, hidden_TH: Tensor) -> Tensor:
        return self.shard.gather_rows(hidden_TH) if self.shard.sequence_parallel else hidden_TH

    def visit(self, hidden_TH: Tensor, head_VH: Tensor) -> HeadVisit:
        """Collectives: under sequence parallelism one all-gather of hidden states a model."""
        ref_hidden_TH = None if self.ref_hidden_TH is None else self._gather(self.ref_hidden_TH)
        operands = HeadOperands(self._gather(hidden_TH), head_VH, ref_hidden_TH, self.ref_head_VH)
        return HeadVisit(operands, self.tokens, self.objective, self.shard, self.chunk_tokens, self.dtype)

    def gradients(
        self, hidden_TH: Tensor, head_VH: Tensor, wanted: tuple[bool, bool], in_place: bool
    ) -> Gradients:
        """Buffers for what is wanted of (hidden, head); with `in_place` the head's is the caller's."""
        hidden_NH = None
        if wanted[0]:
            hidden_NH = hidden_TH.new_empty(self.tokens.count, hidden_TH.shape[1], dtype=self.dtype)
        head = None
        if wanted[1]:
            given = self.head_gradient
            head = given.buffer_VH if in_place and given else torch.zeros_like(head_VH, dtype=self.dtype)
        return Gradients(hidden_NH, head)

    def reduce_hidden(self, gradient_NH: Tensor | None, hidden_dtype: torch.dtype) -> Tensor | None:
        """dHidden summed over the group, laid out as the hidden states came.

        Collectives: one all-reduce of the valid tokens' rows, or under sequence parallelism one
        reduce-scatter of all rows, in the accumulation dtype.
        """
        if gradient_NH is None:
            return None
        if self.shard.sequence_parallel:
            return self.shard.reduce_scatter_rows(self.tokens.scatter(gradient_NH)).to(hidden_dtype)
        return self.tokens.scatter(self.shard.all_reduce_sum_(gradient_NH).to(hidden_dtype))


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in `dtype`, without a temporary in the wider dtype."""
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _check_upstream(upstream: Tensor, expected: float) -> None:
    if upstream.is_cuda:
        # Without synchronising the device, which a comparison on the host would.
        torch._assert_async(upstream == expected)  # pyright: ignore
    elif upstream.item() != expected:
        raise RuntimeError(
            f"the loss sum was multiplied by {upstream.item():g} before backward, upstream_scale "
            f"said {expected:g}, and the head's gradient is already added: pass the factor that is used"
        )


class _GradientsInForward(torch.autograd.Function):
    """The loss sum; gradients are computed in the visit that computes it, and scaled in backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TH: Tensor, head_VH: Tensor, spec: _Spec
    ) -> tuple[Tensor, Tensor]:
        known_scale = spec.head_gradient.upstream_scale if spec.head_gradient else None
        into = spec.gradients(hidden_TH, head_VH, ctx.needs_input_grad[:2], in_place=known_scale is not None)
        visit = spec.visit(hidden_TH, head_VH)
        upstream = None
        if known_scale is not None and known_scale != 1.0:
            upstream = torch.tensor(known_scale, dtype=spec.dtype, device=hidden_TH.device)
        if spec.objective.scope == "token":
            loss_sum, metrics_MN = visit.loss_and_gradients(upstream, into)
        else:
            statistics = visit.statistics()
            loss_N, weight_N, metrics_MN = token_losses(spec.objective, statistics, spec.tokens, slice(None))
            visit.gradients(statistics, weight_N, upstream, into)
            loss_sum = loss_N.sum()
        ctx.hidden_gradient_TH = spec.reduce_hidden(into.hidden_NH, hidden_TH.dtype)
        ctx.head_gradient_VH = None if known_scale is not None else into.head_VH
        ctx.head_gradient, ctx.known_scale, ctx.head_dtype = spec.head_gradient, known_scale, head_VH.dtype
        ctx.mark_non_differentiable(metrics_MN)
        return loss_sum, metrics_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale, hidden_TH, head_VH = upstream[0], ctx.hidden_gradient_TH, ctx.head_gradient_VH
        if ctx.known_scale is not None:
            _check_upstream(scale, ctx.known_scale)
        elif hidden_TH is not None:
            hidden_TH = _scaled(hidden_TH, scale, hidden_TH.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_TH, None, None
        if ctx.head_gradient is None:
            return hidden_TH, _scaled(head_VH, scale, ctx.head_dtype), None
        if head_VH is not None:
            buffer_VH = ctx.head_gradient.buffer_VH
            # addcmul takes the scale as a tensor, which spares a synchronisation.
            buffer_VH.addcmul_(head_VH.to(buffer_VH.dtype), scale.to(buffer_VH.dtype))
        return hidden_TH, ctx.head_gradient.returned(), None


class _GradientsInBackward(torch.autograd.Function):
    """One loss per valid token; gradients are recomputed in backward, where each token's factor is known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TH: Tensor, head_VH: Tensor, spec: _Spec
    ) -> tuple[Tensor, Tensor]:
        statistics = spec.visit(hidden_TH, head_VH).statistics()
        loss_N, weight_N, metrics_MN = token_losses(spec.objective, statistics, spec.tokens, slice(None))
        ctx.save_for_backward(hidden_TH, head_VH)
        ctx.spec, ctx.statistics, ctx.weight_N = spec, statistics, weight_N
        ctx.mark_non_differentiable(metrics_MN)
        return loss_N, metrics_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, head_VH = ctx.saved_tensors
        spec: _Spec = ctx.spec
        into = spec.gradients(hidden_TH, head_VH, ctx.needs_input_grad[:2], in_place=True)
        spec.visit(hidden_TH, head_VH).gradients(ctx.statistics, ctx.weight_N, upstream[0].contiguous(), into)
        hidden_gradient_TH = spec.reduce_hidden(into.hidden_NH, hidden_TH.dtype)
        if into.head_VH is None:
            return hidden_gradient_TH, None, None
        if spec.head_gradient is not None:
            return hidden_gradient_TH, spec.head_gradient.returned(), None
        return hidden_gradient_TH, into.head_VH.to(head_VH.dtype), None


def _check_hidden(hidden_TH: Tensor, num_tokens: int, shard: VocabShard, what: str) -> None:
    ranks = shard.world_size if shard.sequence_parallel else 1
    if hidden_TH.shape[0] * ranks != num_tokens:
        raise ValueError(
            f"{what} has {hidden_TH.shape[0]} rows on each of {ranks} rank(s) and there are {num_tokens} "
            f"labels: under sequence parallelism pass this rank's part of the hidden states and all labels"
        )


def _spec(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    loss_mask_T: Tensor,
    *,
    objective: Objective,
    shard: VocabShard,
    ref_hidden_TH: Tensor | None,
    ref_head_VH: Tensor | None,
    chunk_tokens: ChunkTokens,
    head_gradient: HeadGradient | None,
    per_token: dict[str, Tensor | None],
) -> _Spec:
    """Checks everything and drops what the objective does not read."""
    shard.check_rows(head_VH.shape[0], "the head")
    _check_hidden(hidden_TH, labels_T.shape[0], shard, "hidden_TH")
    require_reference(objective, ref_hidden_TH, ref_head_VH)
    if objective.divergence is None:
        ref_hidden_TH = ref_head_VH = None
    elif ref_hidden_TH is not None and ref_head_VH is not None:
        shard.check_rows(ref_head_VH.shape[0], "the reference's head")
        _check_hidden(ref_hidden_TH, labels_T.shape[0], shard, "ref_hidden_TH")
        ref_hidden_TH, ref_head_VH = ref_hidden_TH.detach(), ref_head_VH.detach()
    if head_gradient is not None and head_gradient.buffer_VH.shape != head_VH.shape:
        raise ValueError(
            f"HeadGradient.buffer_VH has shape {tuple(head_gradient.buffer_VH.shape)}, "
            f"the head {tuple(head_VH.shape)}"
        )
    tokens = valid_tokens(labels_T, loss_mask_T, objective, shard.vocab_size, **per_token)
    dtype = accumulation_dtype(hidden_TH.dtype)
    chunk = resolve_chunk_tokens(
        chunk_tokens,
        num_tokens=tokens.count,
        objective=objective,
        shard=shard,
        dtype=dtype,
        device=hidden_TH.device,
        visits_head=True,
    )
    return _Spec(ref_hidden_TH, ref_head_VH, tokens, objective, shard, chunk, dtype, head_gradient)


def _apply(
    function: type[torch.autograd.Function], hidden_TH: Tensor, head_VH: Tensor, spec: _Spec
) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], function.apply(hidden_TH, head_VH, spec))  # pyright: ignore


def _without_gradients(hidden_TH: Tensor, head_VH: Tensor, spec: _Spec) -> tuple[Tensor, Tensor]:
    """Loss sum, metrics [M, N]; one GEMM a model and nothing kept."""
    statistics = spec.visit(hidden_TH, head_VH).statistics()
    loss_N, _, metrics_MN = token_losses(spec.objective, statistics, spec.tokens, slice(None))
    return loss_N.sum(), metrics_MN


def fused_linear_loss(
    hidden_TH: HiddenTH,
    head_VH: HeadVH,
    labels_T: LabelsT,
    loss_mask_T: LossMaskT,
    *,
    objective: Objective,
    shard: VocabShard,
    ref_hidden_TH: RefHiddenTH | None = None,
    ref_head_VH: RefHeadVH | None = None,
    chunk_tokens: ChunkTokens = "auto",
    segment_ids_T: SegmentIdsT | None = None,
    ref_logprob_T: LogProbT | None = None,
    old_logprob_T: LogProbT | None = None,
    gradients_in: Literal["forward", "backward"] = "forward",
    head_gradient: HeadGradient | None = None,
) -> LossOutput:
    """sum over valid t of (sg(w_t) + c) CE_t + kl_weight * KL_t, of logits  Z = h W^T,  Y = h_ref W_ref^T.

    Only valid tokens reach the head, a chunk of them at a time; logits are accumulated in fp32 and never
    rounded.

    Args:
        hidden_TH: [T, H] final hidden states of the policy, any float dtype; [T / R, H] under
            `shard.sequence_parallel`.
        head_VH: [V, H] this rank's rows of the head, padded rows included.
        labels_T, loss_mask_T: int64 and bool [T], all tokens, the same on all ranks of the group.
        objective: which loss.
        shard: which rows of the vocabulary these are.
        ref_hidden_TH, ref_head_VH: the reference's, constants, laid out like the policy's; its hidden size
            may differ. Ignored where nothing reads them.
        chunk_tokens: "auto" (a byte budget, see `asft_nemo.losses.chunks`) or a number of at least 1.
        segment_ids_T, ref_logprob_T, old_logprob_T: see `dense_loss`.
        gradients_in: "forward" computes gradients in the visit that computes the loss, for when a scalar
            alone multiplies the loss sum afterwards; "backward" recomputes logits there.
        head_gradient: adds the head's gradient to a buffer instead of handing it to autograd.

    Returns:
        `LossOutput`, equal on all ranks, fp32 (fp64 for fp64 hidden states). dHidden comes back summed over
        the group (its rows scattered under sequence parallelism); dHead is this rank's. Where gradients are
        disabled none is computed.

    Raises:
        DataError: a valid label outside the vocabulary.
        ObjectiveError: something the objective reads is missing.
        LayoutError: a head that does not fit the shard.
        ConfigError: chunk_tokens below 1.

    Collectives: a chunk's statistics in one all-gather (3 numbers per token, 6 with a divergence, 20 more for
        top-k entropy); one all-reduce of dHidden's valid rows, in fp32; under sequence parallelism instead an
        all-gather of hidden states a model and a reduce-scatter. "backward" gathers hidden states once more
        there.
    GEMMs of the head's size, both gradients wanted: 3 without a divergence, 4 with one; "backward" and
        sequence scope take one more a model.
    Memory: one [chunk, V] fp32 buffer, three with a divergence; dHidden [valid, H] and dHead [V, H] in fp32
        (the latter not with `head_gradient` and a known scale, nor for a frozen head).
    Source: closed-form logit gradient of arXiv 2509.23753, Eq. 6; chunked heads as in arXiv 2411.09009.
    """
    spec = _spec(
        hidden_TH,
        head_VH,
        labels_T,
        loss_mask_T,
        objective=objective,
        shard=shard,
        ref_hidden_TH=ref_hidden_TH,
        ref_head_VH=ref_head_VH,
        chunk_tokens=chunk_tokens,
        head_gradient=head_gradient,
        per_token={
            "segment_ids_T": segment_ids_T,
            "ref_logprob_T": ref_logprob_T,
            "old_logprob_T": old_logprob_T,
        },
    )
    if gradients_in not in ("forward", "backward"):
        raise ValueError(f"gradients_in={gradients_in!r}: choose forward or backward")
    if not torch.is_grad_enabled() or not (hidden_TH.requires_grad or head_VH.requires_grad):
        loss_sum, metrics_MN = _without_gradients(hidden_TH, head_VH, spec)
    elif gradients_in == "forward":
        loss_sum, metrics_MN = _apply(_GradientsInForward, hidden_TH, head_VH, spec)
    else:
        loss_N, metrics_MN = _apply(_GradientsInBackward, hidden_TH, head_VH, spec)
        loss_sum = loss_N.sum()
    return loss_output(objective, loss_sum, metrics_MN, spec.tokens)


def fused_linear_token_losses(
    hidden_TH: HiddenTH,
    head_VH: HeadVH,
    labels_T: LabelsT,
    loss_mask_T: LossMaskT,
    *,
    objective: Objective,
    shard: VocabShard,
    ref_hidden_TH: RefHiddenTH | None = None,
    ref_head_VH: RefHeadVH | None = None,
    chunk_tokens: ChunkTokens = "auto",
    segment_ids_T: SegmentIdsT | None = None,
    ref_logprob_T: LogProbT | None = None,
    old_logprob_T: LogProbT | None = None,
    head_gradient: HeadGradient | None = None,
) -> Tensor:
    """L_t of every token, 0 where the mask is False: [T], fp32 (fp64 for fp64), each with an upstream factor.

    `fused_linear_loss` with `gradients_in="backward"` before its sum; same arguments, collectives, errors and
    memory.
    """
    spec = _spec(
        hidden_TH,
        head_VH,
        labels_T,
        loss_mask_T,
        objective=objective,
        shard=shard,
        ref_hidden_TH=ref_hidden_TH,
        ref_head_VH=ref_head_VH,
        chunk_tokens=chunk_tokens,
        head_gradient=head_gradient,
        per_token={
            "segment_ids_T": segment_ids_T,
            "ref_logprob_T": ref_logprob_T,
            "old_logprob_T": old_logprob_T,
        },
    )
    loss_N, _ = _apply(_GradientsInBackward, hidden_TH, head_VH, spec)
    return spec.tokens.scatter(loss_N)


def fused_label_logprob(
    hidden_TH: HiddenTH,
    head_VH: HeadVH,
    labels_T: LabelsT,
    loss_mask_T: LossMaskT,
    *,
    shard: VocabShard,
    chunk_tokens: ChunkTokens = "auto",
) -> Tensor:
    """log p(y_t) of every token under  softmax(h W^T), 0 where the mask is False: [T], detached.

    What `ref_logprob_T` and `old_logprob_T` hold, from the reference's or the snapshot's hidden states and
    head. Arguments, collectives and errors as for `fused_linear_loss`; one GEMM, no gradient.
    """
    with torch.no_grad():
        return -fused_linear_token_losses(
            hidden_TH,
            head_VH,
            labels_T,
            loss_mask_T,
            objective=build_objective("sft"),
            shard=shard,
            chunk_tokens=chunk_tokens,
        )
