"""The definition of the loss, in plain PyTorch with plain autograd; every other one must equal it."""

from __future__ import annotations

import torch
from torch import Tensor

from asft_nemo.losses.per_token import accumulation_dtype, require_reference, valid_tokens
from asft_nemo.losses.reduce import LossOutput, loss_output, metrics_of_tokens
from asft_nemo.objectives import TOP_K, Objective, topk_entropy
from asft_nemo.shapes import LabelsT, LogitsTV, LogProbT, LossMaskT, SegmentIdsT


def _divergence(objective: Objective, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL per token from log probabilities; rows both distributions exclude (-inf) contribute 0. [N]."""
    if objective.divergence == "forward":
        terms_NV = logq_NV.exp() * (logq_NV - logp_NV)
        return torch.where(logq_NV == -torch.inf, torch.zeros_like(terms_NV), terms_NV).sum(dim=-1)
    # The log ratio is masked before it is multiplied: -inf - -inf has no gradient to give.
    log_ratio_NV = torch.where(logp_NV == -torch.inf, torch.zeros_like(logp_NV), logp_NV - logq_NV)
    return (logp_NV.exp() * log_ratio_NV).sum(dim=-1)


def dense_loss(
    logits_TV: LogitsTV,
    labels_T: LabelsT,
    loss_mask_T: LossMaskT,
    *,
    objective: Objective,
    ref_logits_TV: LogitsTV | None = None,
    segment_ids_T: SegmentIdsT | None = None,
    ref_logprob_T: LogProbT | None = None,
    old_logprob_T: LogProbT | None = None,
) -> LossOutput:
    """sum over valid t of L_t,  L_t = (sg(w_t) + c) CE_t + kl_weight * KL_t  over the full vocabulary.

    With p, q the policy's and the reference's softmax: CE_t = -log p(y_t), forward KL_t = sum_v q (log q -
    log p), reverse KL_t = sum_v p (log p - log q), w_t and c from the objective's row (a row with its own
    value rule replaces the first term).

    Args:
        logits_TV: [T, V] policy logits over the whole vocabulary, any float dtype; a row of -inf logits in
            every token (a padded vocabulary) does not count.
        labels_T: int64 [T], already shifted; any value where the mask is False.
        loss_mask_T: bool [T]; True counts.
        objective: which loss.
        ref_logits_TV: [T, V] reference logits, a constant; needed where the objective has a divergence, else
            ignored.
        segment_ids_T: int64 [T]; which sequence each token belongs to (sequence-scope objectives).
        ref_logprob_T: [T] reference log probability of the label (iw_sft).
        old_logprob_T: [T] snapshot log probability of the label (psft).

    Returns:
        `LossOutput` in fp32, fp64 for fp64 logits.

    Raises:
        DataError: a valid label outside the vocabulary.
        ObjectiveError: something the objective reads is missing.

    Memory: several [valid tokens, V] tensors; this is the oracle, not the product. No collectives.
    Source: arXiv 2509.23753, Eq. 6, and the sources of `asft_nemo.objectives`.
    """
    require_reference(objective, ref_logits_TV)
    tokens = valid_tokens(
        labels_T,
        loss_mask_T,
        objective,
        logits_TV.shape[1],
        segment_ids_T=segment_ids_T,
        ref_logprob_T=ref_logprob_T,
        old_logprob_T=old_logprob_T,
    )
    dtype = accumulation_dtype(logits_TV.dtype)
    logits_NV = tokens.select(logits_TV).to(dtype)
    logp_NV = logits_NV.log_softmax(dim=-1)
    label_logprob_N = logp_NV.gather(1, tokens.labels_N.unsqueeze(1)).squeeze(1)

    entropy_N = None
    if "topk_entropy" in objective.reads:
        entropy_N = topk_entropy(logits_NV.detach().topk(min(TOP_K, logits_NV.shape[1]), dim=-1).values)
    inputs = tokens.weight_inputs(label_logprob_N, entropy_N, slice(None))
    loss_N = objective.cross_entropy_value(inputs)

    kl_N = None
    if objective.divergence is not None and ref_logits_TV is not None:
        logq_NV = tokens.select(ref_logits_TV.detach()).to(dtype).log_softmax(dim=-1)
        kl_N = _divergence(objective, logp_NV, logq_NV)
        loss_N = loss_N + objective.kl_weight * kl_N

    metrics_MN = metrics_of_tokens(
        objective,
        nll_N=-label_logprob_N,
        weight_N=objective.token_weight(inputs),
        kl_N=kl_N,
        topk_entropy_N=entropy_N,
    )
    return loss_output(objective, loss_N.sum(), metrics_MN, tokens)
