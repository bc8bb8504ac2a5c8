"""An RMSNorm for Megatron's local layer spec.

Megatron's own torch norm refuses sequence parallelism; this one marks its weight instead, so that Megatron reduces the weight's
gradient over the tensor-parallel group as it does for Transformer Engine's norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x * weight / sqrt(mean(x^2) + eps)`` over the last dimension, statistics in fp32 (fp64 for fp64 inputs).

    Args:
        config: Megatron's TransformerConfig; `sequence_parallel` and `params_dtype` are read from it.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., hidden_size]; the result has the dtype of `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight
