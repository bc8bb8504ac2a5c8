"""From micro batches to one global mean: losses travel as sums with counts and are divided once.

Megatron's contract with ``calculate_per_token_loss=True``: the loss function returns (loss sum, number of tokens, logged values); the
schedule backpropagates the sums and `finalize_model_grads` divides all gradients by the global number of tokens (summed over micro
batches and data-parallel ranks). The result does not depend on how the global batch is split.
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
    """

    def __init__(self, *, normalize_by: str):
        super().__init__()
        self.normalize_by = normalize_by
        self.last: dict[str, float] = {}

    def forward(self, batch: dict, forward_out: LossOutput) -> tuple[Tensor, Tensor, Reduced]:  # type: ignore[override]
        """Megatron's 3-tuple of one micro batch: (loss sum, number of tokens as int, sums and counts to log)."""
        loss_sum, num_tokens = forward_out.loss_sum, forward_out.num_tokens
        if self.normalize_by == "micro_batch":
            loss_sum = loss_sum / num_tokens.clamp(min=1)
            num_tokens = (num_tokens > 0).to(num_tokens.dtype)
        logged = {"loss": torch.stack([loss_sum.detach().double(), num_tokens.double()])}
        logged["tokens"] = torch.stack(
            [forward_out.num_tokens.double(), torch.ones_like(num_tokens, dtype=torch.float64)]
        )
        for name, (total, denominator) in forward_out.metrics.items():
            logged[name] = torch.stack(
                [total.double(), torch.as_tensor(denominator, device=total.device).double()]
            )
        return loss_sum, num_tokens.int(), logged

    def reduce(self, losses_reduced_per_micro_batch: Sequence[Reduced]) -> Tensor:
        """Global means of every logged value; one all-reduce over the data-parallel group. Last pipeline stage only.

        Returns:
            The global loss (fp32 scalar). All means are kept in `last` (values without a denominator in this step are absent).
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
            name: total / count for name, (total, count) in values.items() if count and name != "tokens"
        }
        self.last["tokens"] = values["tokens"][0]
        return torch.tensor(self.last.get("loss", 0.0), dtype=torch.float32, device=sums.device)
