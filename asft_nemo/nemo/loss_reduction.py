"""From micro batches to one global mean: losses travel as sums with counts and are divided once.

Megatron's contract with ``calculate_per_token_loss=True``: the loss function returns (loss sum, number of tokens, logged values); the
schedule backpropagates the sums and `finalize_model_grads` divides all gradients by the global number of tokens (summed over micro
batches and data-parallel ranks). The result does not depend on how the global batch is split. Context-parallel ranks count as
data-parallel ones, each with its own tokens of every sequence; Megatron's factor of their number is for losses without a count only
(`forward_step_calc_loss`, megatron-core 0.15.3).

A domain is a file of the training data. Its metrics are sums of the same per-token values over its own tokens; they travel with the
others, under the name ``<metric>/<domain>``. A micro batch holds tokens of some domains only and sends zeros for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from asft_nemo.losses import LossOutput

Reduced = dict[str, Tensor]


class TokenLossReduction(MegatronLossReduction):
    """Sums of the micro batches, reduced over data-parallel ranks.

    Args:
        normalize_by: ``tokens``: one mean over all valid tokens of the global batch. ``micro_batch``: the mean of the micro
            batches' means, as the authors' trainer averages (and properly divided, which theirs is not).
        domains: their names, the same on all ranks, by the batches' ``domain_id``; empty when none are told apart.

    Attributes:
        last: global means of the last step; absent what nothing counted in; under ``tokens``, ``positions`` and ``attended`` the numbers of
            learned tokens, of all positions computed on and of the pairs their attention looked at.
        last_of_domains: the same of each domain that had tokens in it, and their number under ``tokens``.
    """

    def __init__(self, *, normalize_by: str, domains: Sequence[str] = ()):
        super().__init__()
        self.normalize_by = normalize_by
        self.domains = tuple(domains)
        self.last: dict[str, float] = {}
        self.last_of_domains: dict[str, dict[str, float]] = {}

    def forward(self, batch: dict, forward_out: LossOutput) -> tuple[Tensor, Tensor, Reduced]:  # type: ignore[override]
        """Megatron's 3-tuple of one micro batch: (loss sum, number of tokens as int, sums and counts to log)."""
        loss_sum, num_tokens = forward_out.loss_sum, forward_out.num_tokens
        if self.normalize_by == "micro_batch":
            whole = _tokens_of_micro_batch(num_tokens)
            loss_sum = loss_sum / whole.clamp(min=1)
            counted_here = parallel_state.get_context_parallel_rank() == 0
            num_tokens = (whole > 0).to(num_tokens.dtype) * counted_here
        logged = {"loss": torch.stack([loss_sum.detach().double(), num_tokens.double()])}
        logged["tokens"] = torch.stack(
            [forward_out.num_tokens.double(), torch.ones_like(num_tokens, dtype=torch.float64)]
        )
        # counts of what was computed, not of what was learned: they travel along for the number of operations
        positions, attended = batch["tokens"].numel(), batch["attended"]
        logged["computed"] = logged["tokens"].new_tensor([positions, attended])
        for name, (total, denominator) in forward_out.metrics.items():
            logged[name] = torch.stack(
                [total.double(), torch.as_tensor(denominator, device=total.device).double()]
            )
        if self.domains:
            logged |= self._of_domains(batch["domain_id"], forward_out)
        return loss_sum, num_tokens.int(), logged

    def _of_domains(self, domain_id_B: Tensor, output: LossOutput) -> Reduced:
        """Every domain's sum and number of tokens, of every metric."""
        domain_N = domain_id_B[output.index_N % len(domain_id_B)]  # tokens are ordered [S, B]
        values_MN = torch.stack(list(output.token_metrics.values())).double()
        logged = {}
        for place, domain in enumerate(self.domains):
            own_N = domain_N == place
            count, sums_M = own_N.sum().double(), torch.where(own_N, values_MN, 0.0).sum(dim=1)
            for name, total in zip(output.token_metrics, sums_M, strict=True):
                logged[f"{name}/{domain}"] = torch.stack([total, count])
        return logged

    def reduce(self, losses_reduced_per_micro_batch: Sequence[Reduced]) -> Tensor:
        """Global means of every logged value; one all-reduce over the data-parallel group. Last pipeline stage only.

        Returns:
            The global loss (fp32 scalar). All means are kept in `last` and `last_of_domains`.
        """
        names = sorted(losses_reduced_per_micro_batch[0])
        sums = torch.stack(
            [torch.stack([one[name] for name in names]) for one in losses_reduced_per_micro_batch]
        ).sum(0)
        torch.distributed.all_reduce(
            sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        values = dict(zip(names, sums.tolist(), strict=True))
        self.last = {
            name: total / count
            for name, (total, count) in values.items()
            if count and name not in ("tokens", "computed") and "/" not in name
        }
        self.last["tokens"] = values["tokens"][0]
        self.last["positions"], self.last["attended"] = values["computed"]
        self.last_of_domains = {
            domain: means for domain in self.domains if (means := _means_of(domain, values))
        }
        return torch.tensor(self.last.get("loss", 0.0), dtype=torch.float32, device=sums.device)


def _tokens_of_micro_batch(num_tokens: Tensor) -> Tensor:
    """Valid tokens of a whole micro batch, of which a context-parallel rank sees its own only; then one all-reduce of one number."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return num_tokens
    whole = num_tokens.clone()
    torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return whole


def _means_of(domain: str, values: dict[str, Sequence[float]]) -> dict[str, float]:
    """A domain's number of tokens and its means; nothing where it had no token."""
    means: dict[str, float] = {}
    for name, (total, count) in values.items():
        metric, _, owner = name.partition("/")
        if owner == domain and count:
            means |= {"tokens": int(count), metric: total / count}
    return means
