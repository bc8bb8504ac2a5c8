"""From per-token values to what a loss returns: a sum, a count, and metrics with their own denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.objectives import Objective


@dataclass(frozen=True)
class LossOutput:
    """What every loss returns. Nothing in it is divided: the caller divides once, by the global token count.

    Attributes:
        loss_sum: scalar with grad; sum over valid tokens, equal on all tensor-parallel ranks. fp32 (fp64 for fp64).
        num_tokens: int64 scalar; valid tokens.
        metrics: name -> (sum, denominator), detached scalars of loss_sum's dtype. Always `nll`, `weighted_nll`
            ((w_t + c) CE_t) and `token_weight` (w_t); `kl` or `kl_reverse` where the reference's hidden states are read.
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


def loss_output(objective: Objective, loss_sum: Tensor, sums_M: Tensor, num_tokens: int) -> LossOutput:
    """Packs a loss and the metric sums."""
    count = torch.tensor(num_tokens, dtype=torch.int64, device=loss_sum.device)
    denominator = count.to(loss_sum.dtype)
    metrics = {name: (sums_M[i], denominator) for i, name in enumerate(metric_names(objective))}
    return LossOutput(loss_sum=loss_sum, num_tokens=count, metrics=metrics)
