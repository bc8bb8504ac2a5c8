"""From per-token values to what a loss returns: a sum, a count, and metrics with their own denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.losses.per_token import ValidTokens
from asft_nemo.losses.statistics import TokenStatistics
from asft_nemo.objectives import Objective

#: A token whose weight is above this counts in `high_weight_share`; part of the metric's meaning.
HIGH_WEIGHT = 0.9


@dataclass(frozen=True)
class LossOutput:
    """What every loss returns. Nothing in it is divided: the caller divides once, by the global token count.

    Attributes:
        loss_sum: scalar with grad; sum over valid tokens, equal on all tensor-parallel ranks. fp32 (fp64 for
            fp64).
        num_tokens: int64 scalar; valid tokens.
        metrics: name -> (sum, denominator), detached scalars of loss_sum's dtype; the denominator is
            `num_tokens`. Always `nll`, `weighted_nll` ((w_t + c) CE_t), `token_weight` (w_t) and
            `high_weight_share` (1 where w_t > `HIGH_WEIGHT`); `kl` or `kl_reverse` where the reference's
            hidden states are read; `topk_entropy` (nats, see `asft_nemo.objectives.topk_entropy`) where the
            weight rule reads it.
        token_metrics: name -> [N], the terms of those sums, one per valid token; detached.
        index_N: int64, which of the T tokens the N valid ones are.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    token_metrics: dict[str, Tensor]
    index_N: Tensor


def metric_names(objective: Objective) -> tuple[str, ...]:
    """Names of the metrics of an objective, in their order."""
    kl = () if objective.kl_metric is None else (objective.kl_metric,)
    entropy = ("topk_entropy",) if "topk_entropy" in objective.reads else ()
    return ("nll", "weighted_nll", "token_weight", "high_weight_share", *kl, *entropy)


def metrics_of_tokens(
    objective: Objective,
    *,
    nll_N: Tensor,
    weight_N: Tensor,
    kl_N: Tensor | None,
    topk_entropy_N: Tensor | None,
) -> Tensor:
    """Every metric of every given token, in the order of `metric_names`. [M, N], detached."""
    rows = [
        nll_N,
        (weight_N + objective.ce_share) * nll_N,
        weight_N,
        (weight_N > HIGH_WEIGHT).to(nll_N.dtype),
    ]
    rows += [row_N for row_N in (kl_N, topk_entropy_N) if row_N is not None]
    return torch.stack([row_N.detach() for row_N in rows])


def token_losses(
    objective: Objective, statistics: TokenStatistics, tokens: ValidTokens, chunk: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """L_t = (w_t + c) CE_t + kl_weight * KL_t from statistics.

    Args:
        statistics: of the tokens in `chunk` alone.
        tokens: all valid tokens, for what else the weight rule reads of those in `chunk`.

    Returns:
        loss_N, weight_N (w_t), and the metrics of these tokens [M, N]; all detached.
    """
    inputs = tokens.weight_inputs(statistics.label_logprob_N, statistics.topk_entropy_N, chunk)
    weight_N = objective.token_weight(inputs)
    loss_N = objective.cross_entropy_value(inputs)
    if statistics.kl_N is not None:
        loss_N = loss_N + objective.kl_weight * statistics.kl_N
    metrics_MN = metrics_of_tokens(
        objective,
        nll_N=-statistics.label_logprob_N,
        weight_N=weight_N,
        kl_N=statistics.kl_N,
        topk_entropy_N=statistics.topk_entropy_N,
    )
    return loss_N, weight_N, metrics_MN


def loss_output(
    objective: Objective, loss_sum: Tensor, metrics_MN: Tensor, tokens: ValidTokens
) -> LossOutput:
    """Packs a loss and the metrics of its tokens."""
    count = torch.tensor(tokens.count, dtype=torch.int64, device=loss_sum.device)
    denominator, sums_M = count.to(loss_sum.dtype), metrics_MN.sum(dim=1)
    names = metric_names(objective)
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=count,
        metrics={name: (sums_M[i], denominator) for i, name in enumerate(names)},
        token_metrics={name: metrics_MN[i] for i, name in enumerate(names)},
        index_N=tokens.index_N,
    )
