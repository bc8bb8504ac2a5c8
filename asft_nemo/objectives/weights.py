"""Token weights w_t of the objectives: pure functions of per-token log probabilities.

Every rule takes `WeightInputs` (valid tokens only) and the objective's options, and returns one detached
weight per token in the dtype of `label_logprob_N`. The logit gradient of every objective is

    (w_t + c) (p - 1_y) + kl_weight * dD

so a rule never needs the vocabulary: what it reads arrives as per-token numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from asft_nemo.errors import ObjectiveError

#: Candidates in EAFT's entropy; fixed by its paper, part of the formula (ln 20), and of the exchange's size.
TOP_K = 20
#: Upper end of iw-SFT's clamp, as in its paper.
MAX_SEQUENCE_WEIGHT = 16.0


@dataclass(frozen=True)
class WeightInputs:
    """What a weight rule may read, one entry per valid token; None where the objective does not read it.

    Attributes:
        label_logprob_N: log pi(y_t), natural log, <= 0.
        ref_label_logprob_N: the reference's log probability of the label.
        old_label_logprob_N: the snapshot's log probability of the label.
        topk_entropy_N: entropy in nats of the renormalised `TOP_K` largest probabilities.
        segment_ids_N: which sequence a token belongs to; any int64 values.
    """

    label_logprob_N: Tensor
    ref_label_logprob_N: Tensor | None = None
    old_label_logprob_N: Tensor | None = None
    topk_entropy_N: Tensor | None = None
    segment_ids_N: Tensor | None = None


def _present(value: Tensor | None, what: str, cure: str) -> Tensor:
    if value is None:
        raise ObjectiveError(f"the objective reads {what} and got none: {cure}")
    return value


def one(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """w_t = 1 (plain cross entropy)."""
    return torch.ones_like(inputs.label_logprob_N)


def label_probability(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """w_t = sg(p_t), the policy's probability of the label (DFT, arXiv 2508.05629)."""
    return inputs.label_logprob_N.detach().exp()


def sequence_importance(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """w_t = clamp(exp(T * mean over the sequence of (log pi - log ref)), 0, 16) (iw-SFT, arXiv 2507.12856).

    The mean is over the sequence's valid tokens, so a sequence must lie whole in the micro batch.
    """
    ref_N = _present(
        inputs.ref_label_logprob_N,
        "the reference's label log probabilities (ref_logprob_T)",
        "run the reference ahead of the step (reference=resident)",
    )
    segments_N = _present(
        inputs.segment_ids_N, "segment ids (segment_ids_T)", "number the sequences of the micro batch"
    )
    log_ratio_N = inputs.label_logprob_N.detach() - ref_N.to(inputs.label_logprob_N.dtype)
    unique = cast(tuple[Tensor, Tensor], torch.unique(segments_N, return_inverse=True))  # pyright: ignore
    index_N = unique[1]
    # Sized by the tokens, an upper bound of the segments, which spares a device synchronisation.
    sums = log_ratio_N.new_zeros(log_ratio_N.shape).index_add_(0, index_N, log_ratio_N)
    counts = log_ratio_N.new_zeros(log_ratio_N.shape).index_add_(0, index_N, torch.ones_like(log_ratio_N))
    mean_N = (sums / counts.clamp(min=1))[index_N]
    return (options["temperature"] * mean_N).exp().clamp(0.0, MAX_SEQUENCE_WEIGHT)


def entropy_ratio(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """w_t = (H_top20 / ln 20)^a (EAFT, arXiv 2601.02151)."""
    entropy_N = _present(
        inputs.topk_entropy_N, "the top-k entropy", "pass the policy's logits through the loss"
    )
    return (entropy_N.detach() / math.log(TOP_K)).clamp(min=0.0).pow(options["exponent"])


def _ratio(inputs: WeightInputs) -> Tensor:
    old_N = _present(
        inputs.old_label_logprob_N,
        "the snapshot's label log probabilities (old_logprob_T)",
        "run the snapshot of the policy ahead of the step",
    )
    return (inputs.label_logprob_N - old_N.detach().to(inputs.label_logprob_N.dtype)).exp()


def clipped_ratio(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """w_t = r if r <= 1 + clip_high else 0, with r = pi / pi_old (PSFT, arXiv 2508.17784).

    This is minus the derivative of `clipped_surrogate` with respect to log pi: below 1 - clip_low the minimum
    takes the unclipped branch, so the lower clip never acts.
    """
    ratio_N = _ratio(inputs).detach()
    return torch.where(ratio_N <= 1.0 + options["clip_high"], ratio_N, torch.zeros_like(ratio_N))


def clipped_surrogate(inputs: WeightInputs, options: Mapping[str, float]) -> Tensor:
    """L_t = -min(r, clip(r, 1 - clip_low, 1 + clip_high)), with r = pi / pi_old (PSFT, arXiv 2508.17784).

    Differentiable in `label_logprob_N`; its gradient is that of weight `clipped_ratio` times cross entropy.
    """
    ratio_N = _ratio(inputs)
    return -torch.minimum(ratio_N, ratio_N.clamp(1.0 - options["clip_low"], 1.0 + options["clip_high"]))


def topk_entropy(top_logits_NK: Tensor) -> Tensor:
    """H = -sum_k s_k ln s_k with s = softmax over the given top logits, in nats.

    Args:
        top_logits_NK: the `TOP_K` largest logits of each token in any order; -inf entries do not count.

    Returns:
        [N] entropies in [0, ln TOP_K], in the dtype given.
    """
    log_share_NK = top_logits_NK.log_softmax(dim=-1)
    share_NK = log_share_NK.exp()
    return -torch.where(share_NK > 0, share_NK * log_share_NK, torch.zeros_like(share_NK)).sum(dim=-1)
