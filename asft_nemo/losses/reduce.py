"""From per-token values to what a loss returns: a sum, a count, and metrics with their own denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.losses.per_token import ValidTokens
from asft_nemo.losses.statistics import TokenStatistics
from asft_nemo.objectives import Objective


@dataclass(frozen=True)
class LossOutput:
    """What every loss returns. Nothing in it is divided: the caller divides once, by the global token count.

    Attributes:
        loss_sum: scalar with grad; sum over valid tokens, equal on all tensor-parallel ranks. fp32 (fp64 for
            fp64).
        num_tokens: int64 scalar; valid tokens.
        metrics: name -> (sum, denominator), detached scalars of loss_sum's dtype. Always `nll`,
            `weighted_nll` ((w_t + c) CE_t) and `token_weight` (w_t); `kl` or `kl_reverse` where the
            reference's hidden states are read.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


def metric_names(objective: Objective) -> tuple[str, ...]:
    """Names of the metrics of an objective, in their order."""
    kl = () if objective.kl_metric is None else (objective.kl_metric,)
    return ("nll", "weighted_nll", "token_weight", *kl)


def metric_sums(objective: Objective, nll_N: Tensor, weight_N: Tensor, kl_N: Tensor | None) -> Tensor:
    """Sums over the given tokens in the order of `metric_names`. [number of metrics], detached."""
    columns = [nll_N, (weight_N + objective.ce_share) * nll_N, weight_N]
    if kl_N is not None:
        columns.append(kl_N)
    return torch.stack([column.detach().sum() for column in columns])


def token_losses(
    objective: Objective, statistics: TokenStatistics, tokens: ValidTokens, chunk: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """L_t = (w_t + c) CE_t + kl_weight * KL_t from statistics.

    Args:
        statistics: of the tokens in `chunk` alone.
        tokens: all valid tokens, for what else the weight rule reads of those in `chunk`.

    Returns:
        loss_N, weight_N (w_t), and the metric sums of these tokens; all detached.
    """
    inputs = tokens.weight_inputs(statistics.label_logprob_N, statistics.topk_entropy_N, chunk)
    weight_N = objective.token_weight(inputs)
    loss_N = objective.cross_entropy_value(inputs)
    if statistics.kl_N is not None:
        loss_N = loss_N + objective.kl_weight * statistics.kl_N
    return loss_N, weight_N, metric_sums(objective, -statistics.label_logprob_N, weight_N, statistics.kl_N)


def loss_output(objective: Objective, loss_sum: Tensor, sums_M: Tensor, num_tokens: int) -> LossOutput:
    """Packs a loss and the metric sums."""
    count = torch.tensor(num_tokens, dtype=torch.int64, device=loss_sum.device)
    denominator = count.to(loss_sum.dtype)
    metrics = {name: (sums_M[i], denominator) for i, name in enumerate(metric_names(objective))}
    return LossOutput(loss_sum=loss_sum, num_tokens=count, metrics=metrics)
