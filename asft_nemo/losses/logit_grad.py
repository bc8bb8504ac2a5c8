"""The logit gradient in closed form, written over the exponentials it is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from asft_nemo.losses.row_blocks import row_blocks
from asft_nemo.losses.statistics import Exponentials, RawLogits, TokenStatistics
from asft_nemo.losses.triton import row_gradient
from asft_nemo.objectives import Objective


def logit_gradient(
    objective: Objective,
    exps: Exponentials | RawLogits,
    statistics: TokenStatistics,
    weight_N: Tensor,
    own_N: Tensor,
    label_index_N: Tensor,
    upstream_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """G = g [(w + c)(p - 1_y) + kl_weight dD],  forward dD = p - q,  reverse dD = p (log p - log q - KL).

    The divergence is added as its own term: equal models give exactly 0, and a small drift is not rounded
    away against the cross entropy's share of p.

    Args:
        exps: from `local_statistics` or `probabilities`; consumed, the result lies in `exps.policy_NV`.
        statistics: of the whole vocabulary.
        weight_N: w, without c.
        own_N, label_index_N: from `VocabShard.local_index`.
        upstream_N: g, one factor per token (or a scalar); None for 1.
        dtype: of the result; None, or the logits' own, for the accumulation dtype. Another one makes the
            result a tensor of its own.

    Returns:
        [N, V] gradient of the sum over tokens of g_t L_t with respect to this rank's logits.

    Memory: no [N, V] temporary. Source: DESIGN, "rows, not branches"; arXiv 2509.23753 for the forward case.
    """
    dtype = dtype or exps.policy_NV.dtype
    if isinstance(exps, RawLogits):
        return row_gradient(
            objective,
            exps.policy_NV,
            exps.ref_NV,
            statistics,
            weight_N,
            own_N,
            label_index_N,
            upstream_N,
            dtype,
        )
    for rows in row_blocks(exps.policy_NV):
        upstream = upstream_N if upstream_N is None or upstream_N.ndim == 0 else upstream_N[rows]
        _from_exponentials(
            objective,
            exps[rows],
            statistics[rows],
            weight_N[rows],
            own_N[rows],
            label_index_N[rows],
            upstream,
        )
    return exps.policy_NV.to(dtype)


def _from_exponentials(
    objective: Objective,
    exps: Exponentials,
    statistics: TokenStatistics,
    weight_N: Tensor,
    own_N: Tensor,
    label_index_N: Tensor,
    upstream_N: Tensor | None,
) -> None:
    """`logit_gradient` of a block of rows in PyTorch, in place."""
    gradient_NV = exps.policy_NV
    if gradient_NV.shape[1] == 0:
        return
    ce_weight_N = weight_N + objective.ce_share
    kl_weight_N = torch.full_like(weight_N, objective.kl_weight)
    if upstream_N is not None:
        ce_weight_N = ce_weight_N * upstream_N
        kl_weight_N = kl_weight_N * upstream_N
    if exps.shift_N is not None:
        gradient_NV.mul_((exps.shift_N - statistics.lse_N).exp().unsqueeze(1))
    if objective.divergence == "forward":
        ref_NV, ref_lse_N = exps.ref_NV, statistics.ref_lse_N
        assert ref_NV is not None
        assert ref_lse_N is not None
        if exps.ref_shift_N is not None:
            ref_NV.mul_((exps.ref_shift_N - ref_lse_N).exp().unsqueeze(1))
        torch.sub(gradient_NV, ref_NV, out=ref_NV)
        gradient_NV.mul_(ce_weight_N.unsqueeze(1)).addcmul_(ref_NV, kl_weight_N.unsqueeze(1))
    elif objective.divergence == "reverse":
        difference_NV, ref_lse_N, kl_N = exps.difference_NV, statistics.ref_lse_N, statistics.kl_N
        assert difference_NV is not None
        assert ref_lse_N is not None
        assert kl_N is not None
        offset_N = kl_N + (statistics.lse_N - ref_lse_N)
        # log p - log q - KL = -(y - z) - offset
        difference_NV.add_(offset_N.unsqueeze(1)).mul_(-kl_weight_N.unsqueeze(1)).add_(
            ce_weight_N.unsqueeze(1)
        )
        gradient_NV.mul_(difference_NV)
    else:
        gradient_NV.mul_(ce_weight_N.unsqueeze(1))
    index_N1 = label_index_N.unsqueeze(1)
    label_term_N1 = ce_weight_N.unsqueeze(1).masked_fill(~own_N.unsqueeze(1), 0.0)
    # One label per row, so writing back never collides and stays deterministic on a GPU.
    gradient_NV.scatter_(1, index_N1, gradient_NV.gather(1, index_N1) - label_term_N1)
