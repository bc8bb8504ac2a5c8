"""Per-token statistics of sharded logits: a few numbers per token and rank say everything about the softmax.

With z, y the policy's and the reference's logits of one token, each rank of the tensor-parallel group reduces
its own vocabulary rows to

    m_z = max z,  s_z = sum e^(z - m_z),  z_label (0 where another rank has it)
    m_y = max y,  s_y = sum e^(y - m_y),  cross = sum e^(y - m_y) (y - z)   (reverse: sum e^(z - m_z) (z - y))

One all-gather of these brings every rank all of them, and each combines them alike, so the results are equal
bit for bit on all ranks. Sums over a maximum that is only local cannot be all-reduced in one collective;
gathering can.

    log sum e^z = M + log sum_r s_r e^(m_r - M),   M = max_r m_r
    KL(ref||policy) = cross - lse_y + lse_z,   KL(policy||ref) = cross - lse_z + lse_y   (cross normalised)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.losses.row_blocks import row_blocks, rows_per_block
from asft_nemo.losses.triton import row_statistics, use_triton
from asft_nemo.losses.vocab_shard import VocabShard
from asft_nemo.objectives import TOP_K, Objective, topk_entropy


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of each token's softmax over the whole vocabulary. Tensors [N], accumulation dtype.

    Attributes:
        lse_N: log sum exp of the policy's logits.
        label_logprob_N: log p(y_t).
        ref_lse_N: log sum exp of the reference's logits, None without a divergence.
        kl_N: the divergence in the objective's direction, None without one.
        topk_entropy_N: see `asft_nemo.objectives.topk_entropy`, None where not read.
    """

    lse_N: Tensor
    label_logprob_N: Tensor
    ref_lse_N: Tensor | None = None
    kl_N: Tensor | None = None
    topk_entropy_N: Tensor | None = None

    @staticmethod
    def concatenate(parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """The statistics of consecutive tokens."""

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor_N for tensor_N in tensors if tensor_N is not None]
            return torch.cat(present) if present else None

        return TokenStatistics(
            torch.cat([part.lse_N for part in parts]),
            torch.cat([part.label_logprob_N for part in parts]),
            joined([part.ref_lse_N for part in parts]),
            joined([part.kl_N for part in parts]),
            joined([part.topk_entropy_N for part in parts]),
        )

    def __getitem__(self, chunk: slice) -> TokenStatistics:
        def part(tensor_N: Tensor | None) -> Tensor | None:
            return None if tensor_N is None else tensor_N[chunk]

        return TokenStatistics(
            self.lse_N[chunk],
            self.label_logprob_N[chunk],
            part(self.ref_lse_N),
            part(self.kl_N),
            part(self.topk_entropy_N),
        )


@dataclass
class Exponentials:
    """A chunk of logits turned in place into exponentials, a factor per token away from probabilities.

    Attributes:
        policy_NV: e^(z - shift).
        ref_NV: e^(y - ref_shift), with a forward divergence only.
        difference_NV: y - z, with a reverse divergence only.
        shift_N, ref_shift_N: what was subtracted, -inf on a rank without vocabulary rows that count; None
            where it was the log sum exp over the whole vocabulary, so that the exponentials already are
            probabilities.
    """

    policy_NV: Tensor
    shift_N: Tensor | None
    ref_NV: Tensor | None = None
    ref_shift_N: Tensor | None = None
    difference_NV: Tensor | None = None

    def __getitem__(self, rows: slice) -> Exponentials:
        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return Exponentials(
            self.policy_NV[rows],
            part(self.shift_N),
            part(self.ref_NV),
            part(self.ref_shift_N),
            part(self.difference_NV),
        )


@dataclass
class RawLogits:
    """A chunk of logits as they were: the Triton kernel of the gradient takes the exponentials itself.

    Attributes:
        policy_NV, ref_NV: z and y, the latter with a divergence only.
    """

    policy_NV: Tensor
    ref_NV: Tensor | None


def floats_per_token(objective: Objective) -> int:
    """K, the numbers a rank sends per valid token: 3, 6 with a divergence, `TOP_K` more for top-k entropy."""
    return 3 + (3 if objective.divergence else 0) + (TOP_K if "topk_entropy" in objective.reads else 0)


def probabilities(
    objective: Objective, logits_NV: Tensor, ref_logits_NV: Tensor | None, statistics: TokenStatistics
) -> Exponentials | RawLogits:
    """A chunk visited again, its statistics known: the logits are overwritten by what the gradient needs."""
    if use_triton(logits_NV):
        return RawLogits(logits_NV, ref_logits_NV)
    difference_NV = None
    if ref_logits_NV is not None and statistics.ref_lse_N is not None:
        if objective.divergence == "reverse":
            difference_NV, ref_logits_NV = ref_logits_NV.sub_(logits_NV), None
        else:
            ref_logits_NV.sub_(statistics.ref_lse_N.unsqueeze(1)).exp_()
    logits_NV.sub_(statistics.lse_N.unsqueeze(1)).exp_()
    return Exponentials(logits_NV, None, ref_logits_NV, None, difference_NV)


def _row_max(logits_NV: Tensor) -> Tensor:
    if logits_NV.shape[1] == 0:
        return logits_NV.new_full((logits_NV.shape[0],), -torch.inf)
    return logits_NV.amax(dim=1)


def _top_logits(logits_NV: Tensor) -> Tensor:
    """The `TOP_K` largest logits of this rank, -inf where it has fewer. [N, TOP_K]."""
    top_NK = logits_NV.topk(min(TOP_K, logits_NV.shape[1]), dim=1).values
    return torch.nn.functional.pad(top_NK, (0, TOP_K - top_NK.shape[1]), value=-torch.inf)


def local_statistics(
    objective: Objective,
    logits_NV: Tensor,
    ref_logits_NV: Tensor | None,
    own_N: Tensor,
    label_index_N: Tensor,
    scratch_NV: Tensor | None = None,
) -> tuple[Tensor, Exponentials | RawLogits]:
    """This rank's statistics of a chunk of tokens.

    Args:
        objective: says which statistics are needed.
        logits_NV: [N, V] policy logits of the rows that count, at least one, accumulation dtype; consumed.
        ref_logits_NV: the reference's, consumed; None where the objective has no divergence.
        own_N, label_index_N: from `VocabShard.local_index`.
        scratch_NV: from `scratch_for`, for the difference of the logits where there is a divergence; None
            allocates.

    Returns:
        packed_NK with K = `floats_per_token`, to be gathered over the ranks, and what `logit_gradient` needs.

    Memory: that of `scratch_for`, which is kept for the gradient only in reverse. None, and `scratch_NV`
        unused, where the Triton kernels run.
    """
    columns: list[Tensor] = []
    if "topk_entropy" in objective.reads:
        columns.append(_top_logits(logits_NV))
    if use_triton(logits_NV):
        packed_NK = row_statistics(objective, logits_NV, ref_logits_NV, own_N, label_index_N)
        left: Exponentials | RawLogits = RawLogits(logits_NV, ref_logits_NV)
    else:
        packed_NK, left = _exponentials(objective, logits_NV, ref_logits_NV, own_N, label_index_N, scratch_NV)
    return torch.cat([packed_NK, *columns], dim=1), left


def scratch_for(objective: Objective, logits_NV: Tensor) -> Tensor | None:
    """Memory for the difference of both models' logits: [N, V] in reverse, where the gradient reads it, a block of rows forward.

    None without a divergence, and where the Triton kernels run.
    """
    if objective.divergence is None or use_triton(logits_NV):
        return None
    rows, columns = logits_NV.shape
    if objective.divergence == "forward":
        rows = min(rows_per_block(logits_NV), rows)
    return logits_NV.new_empty(rows, columns)


def _exponentials(
    objective: Objective,
    logits_NV: Tensor,
    ref_logits_NV: Tensor | None,
    own_N: Tensor,
    label_index_N: Tensor,
    scratch_NV: Tensor | None,
) -> tuple[Tensor, Exponentials]:
    """`local_statistics` without top-k entropy, in PyTorch; both logits are overwritten, some rows after others."""
    if scratch_NV is None:
        scratch_NV = scratch_for(objective, logits_NV)
    parts: list[Tensor] = []
    for rows in row_blocks(logits_NV):
        ref_rows_NV = difference_NV = None
        if ref_logits_NV is not None and scratch_NV is not None:
            ref_rows_NV = ref_logits_NV[rows]
            reverse = objective.divergence == "reverse"
            difference_NV = scratch_NV[rows] if reverse else scratch_NV[: len(ref_rows_NV)]
        parts.append(
            _exponentials_of_rows(
                objective, logits_NV[rows], ref_rows_NV, difference_NV, own_N[rows], label_index_N[rows]
            )
        )
    packed_NK = torch.cat(parts)
    left = Exponentials(logits_NV, packed_NK[:, 0])
    if objective.divergence is not None:
        left.ref_shift_N = packed_NK[:, 3]
        left.ref_NV = ref_logits_NV if objective.divergence == "forward" else None
        left.difference_NV = scratch_NV if objective.divergence == "reverse" else None
    return packed_NK, left


def _exponentials_of_rows(
    objective: Objective,
    logits_NV: Tensor,
    ref_logits_NV: Tensor | None,
    difference_NV: Tensor | None,
    own_N: Tensor,
    label_index_N: Tensor,
) -> Tensor:
    """One block of rows: packed_NK; leaves exponentials in the logits, and y - z in `difference_NV` in reverse."""
    if logits_NV.shape[1]:
        label_logit_N = logits_NV.gather(1, label_index_N.unsqueeze(1)).squeeze(1).masked_fill_(~own_N, 0.0)
    else:
        label_logit_N = logits_NV.new_zeros(logits_NV.shape[0])
    max_N = _row_max(logits_NV)
    if ref_logits_NV is not None:
        torch.sub(ref_logits_NV, logits_NV, out=difference_NV)
    logits_NV.sub_(max_N.unsqueeze(1)).exp_()
    statistics = [max_N, logits_NV.sum(dim=1), label_logit_N]
    if ref_logits_NV is not None and difference_NV is not None:
        ref_max_N = _row_max(ref_logits_NV)
        ref_logits_NV.sub_(ref_max_N.unsqueeze(1)).exp_()
        ref_sum_N = ref_logits_NV.sum(dim=1)
        if objective.divergence == "forward":
            cross_N = difference_NV.mul_(ref_logits_NV).sum(dim=1)
        else:
            torch.mul(logits_NV, difference_NV, out=ref_logits_NV)
            cross_N = ref_logits_NV.sum(dim=1).neg_()
        statistics += [ref_max_N, ref_sum_N, cross_N]
    return torch.stack(statistics, dim=1)


def combine(objective: Objective, gathered_RNK: Tensor) -> TokenStatistics:
    """Statistics over the whole vocabulary from those of every rank, see `VocabShard.all_gather`."""
    max_RN, sum_RN, label_RN = gathered_RNK[..., 0], gathered_RNK[..., 1], gathered_RNK[..., 2]
    max_N = max_RN.amax(dim=0)
    scale_RN = (max_RN - max_N).exp()
    total_N = (sum_RN * scale_RN).sum(dim=0)
    lse_N = max_N + total_N.log()
    ref_lse_N = kl_N = entropy_N = None
    if objective.divergence is not None:
        ref_max_RN, ref_sum_RN, cross_RN = gathered_RNK[..., 3], gathered_RNK[..., 4], gathered_RNK[..., 5]
        ref_max_N = ref_max_RN.amax(dim=0)
        ref_scale_RN = (ref_max_RN - ref_max_N).exp()
        ref_total_N = (ref_sum_RN * ref_scale_RN).sum(dim=0)
        ref_lse_N = ref_max_N + ref_total_N.log()
        if objective.divergence == "forward":
            kl_N = (cross_RN * ref_scale_RN).sum(dim=0) / ref_total_N - (ref_lse_N - lse_N)
        else:
            kl_N = (cross_RN * scale_RN).sum(dim=0) / total_N - (lse_N - ref_lse_N)
    if "topk_entropy" in objective.reads:
        candidates_NK = gathered_RNK[..., -TOP_K:].permute(1, 0, 2).flatten(1)
        entropy_N = topk_entropy(candidates_NK.topk(TOP_K, dim=1).values)
    return TokenStatistics(lse_N, label_RN.sum(dim=0) - lse_N, ref_lse_N, kl_N, entropy_N)


def exchange(objective: Objective, packed_NK: Tensor, shard: VocabShard) -> TokenStatistics:
    """One all-gather of K numbers per token, then `combine`."""
    return combine(objective, shard.all_gather(packed_NK))
