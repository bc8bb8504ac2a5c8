"""From tensors to kernel launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asft_nemo.objectives import Objective
from asft_nemo.objectives import objective as build_objective

if TYPE_CHECKING:
    from asft_nemo.losses.statistics import TokenStatistics

#: Columns a program holds at a time: 16 fp32 numbers a thread and tensor.
BLOCK_COLUMNS = 4096
WARPS = 8


def _kernels() -> Any:
    """Imported at the first launch, not with the package: there triton may be missing."""
    from asft_nemo.losses.triton import kernels

    return kernels


def _block(columns: int) -> int:
    return min(BLOCK_COLUMNS, 1 << max(columns - 1, 0).bit_length())


def _rows(logits_NV: Tensor) -> Tensor:
    """The kernels know the distance between rows; columns must lie side by side."""
    if logits_NV.stride(1) != 1 and logits_NV.shape[1] > 1:
        raise ValueError(f"logits with strides {logits_NV.stride()}: the last dim must be contiguous")
    return logits_NV


def row_statistics(
    objective: Objective,
    logits_NV: Tensor,
    ref_logits_NV: Tensor | None,
    own_N: Tensor,
    label_index_N: Tensor,
) -> Tensor:
    """This rank's statistics of each row, the logits read once and left as they are.

    Args:
        objective: says which divergence there is.
        logits_NV, ref_logits_NV: fp32, not empty; rows at any distance.
        own_N, label_index_N: from `VocabShard.local_index`.

    Returns:
        [N, 3], or [N, 6] with a divergence: the columns of `local_statistics` without top-k entropy.

    Memory: the result. Source: online softmax, arXiv 1805.02867.
    """
    divergence = None if ref_logits_NV is None else objective.divergence
    ref_NV = logits_NV if ref_logits_NV is None else _rows(ref_logits_NV)
    rows, columns = _rows(logits_NV).shape
    packed_NK = logits_NV.new_empty(rows, 6 if divergence else 3)
    with torch.cuda.device_of(logits_NV):
        _kernels().row_statistics_kernel[(rows,)](
            logits_NV,
            ref_NV,
            own_N.contiguous().view(torch.uint8),
            label_index_N.contiguous(),
            packed_NK,
            columns,
            logits_NV.stride(0),
            ref_NV.stride(0),
            packed_NK.stride(0),
            DIVERGENCE=divergence or "none",
            BLOCK=_block(columns),
            num_warps=WARPS,
        )
    return packed_NK


def row_gradient(
    objective: Objective,
    logits_NV: Tensor,
    ref_logits_NV: Tensor | None,
    statistics: TokenStatistics,
    weight_N: Tensor,
    own_N: Tensor,
    label_index_N: Tensor,
    upstream_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The logit gradient of `asft_nemo.losses.logit_grad`, the logits read once.

    Args:
        logits_NV, ref_logits_NV: as for `row_statistics`.
        statistics: of the whole vocabulary, fp32.
        weight_N, own_N, label_index_N, upstream_N: as for `logit_gradient`.
        dtype: of the result. In fp32 the policy's logits are overwritten with it.

    Returns:
        [N, V] gradient with respect to this rank's logits.

    Memory: nothing in fp32, else the result.
    """
    divergence = objective.divergence
    ref_NV = logits_NV if ref_logits_NV is None else _rows(ref_logits_NV)
    rows, columns = _rows(logits_NV).shape
    out_NV = logits_NV if dtype == logits_NV.dtype else logits_NV.new_empty(rows, columns, dtype=dtype)
    weight_N = weight_N.contiguous()
    # What a variant of the kernel does not read still is an argument: any tensor does.
    upstream = weight_N if upstream_N is None else upstream_N.contiguous()
    block = _block(columns)
    with torch.cuda.device_of(logits_NV):
        _kernels().row_gradient_kernel[(rows, -(-columns // block))](
            logits_NV,
            ref_NV,
            out_NV,
            weight_N,
            upstream,
            own_N.contiguous().view(torch.uint8),
            label_index_N.contiguous(),
            statistics.lse_N.contiguous(),
            weight_N if statistics.ref_lse_N is None else statistics.ref_lse_N.contiguous(),
            weight_N if statistics.kl_N is None else statistics.kl_N.contiguous(),
            float(objective.ce_share),
            float(objective.kl_weight),
            columns,
            logits_NV.stride(0),
            ref_NV.stride(0),
            out_NV.stride(0),
            # A scalar is read at distance 0, one factor a token at distance 1.
            upstream.ndim,
            DIVERGENCE=divergence or "none",
            HAS_UPSTREAM=upstream_N is not None,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out_NV


def try_out(device: torch.device) -> None:
    """Compiles and runs the kernels on two columns; raises whatever stands in their way there."""
    from asft_nemo.losses.statistics import TokenStatistics

    logits_NV = torch.zeros(1, 2, device=device)
    own_N = torch.ones(1, dtype=torch.bool, device=device)
    label_index_N = torch.zeros(1, dtype=torch.int64, device=device)
    chosen = build_objective("sft")
    packed_NK = row_statistics(chosen, logits_NV, None, own_N, label_index_N)
    statistics = TokenStatistics(packed_NK[:, 1].log(), packed_NK[:, 2])
    weight_N = torch.ones(1, device=device)
    gradient_NV = row_gradient(
        chosen, logits_NV, None, statistics, weight_N, own_N, label_index_N, None, logits_NV.dtype
    )
    wrong = (gradient_NV - gradient_NV.new_tensor([[-0.5, 0.5]])).abs().max().item()
    if not wrong < 1e-6:
        raise RuntimeError(f"the gradient of two equal logits is off by {wrong:g}")
