"""The head's three matrix products, always accumulated in the dtype of the result.

    logits  Z = h W^T        hidden gradient  dh += G W        head gradient  dW += G^T h

bf16 operands stay bf16 only where the device multiplies them into fp32 (CUDA with a torch that can say so).
Everywhere else they are widened first, the head a block of rows at a time: logits are never rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

#: Bytes of a widened block of the head.
_WIDENED_BYTES = 16 * 2**20
#: Bytes of a block of a product that is added to a sum afterwards; a GPU's matrix units want thousands of rows.
_SUMMED_BYTES = 256 * 2**20


def _mixed_gemm(*operands: Tensor) -> bool:
    """True where low-precision operands multiply straight into fp32 (torch >= 2.8 on CUDA)."""
    low = operands[0].dtype in (torch.bfloat16, torch.float16)
    same = all(operand.dtype == operands[0].dtype and operand.is_cuda for operand in operands)
    return low and same and "dtype_out" in torch.ops.aten.mm.overloads()


@cache
def _adds_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of `dtype` to an fp32 sum.

    2.8 and 2.9 have the overload and refuse an fp32 sum in it ("self and mat2 must have the same dtype", `_addmm_dtype_out_cuda`;
    pytorch/pytorch#167931 lets it through, and its builds have no version to go by): so it is tried.
    """
    if device.type == "meta":  # nothing is computed
        return True
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    total = torch.zeros(8, 8, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
    except RuntimeError:
        return False
    return True


def _row_blocks(head_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype`: whole where it already is, else block after block of widened rows."""
    rows = head_VH.shape[0]
    step = rows if head_VH.dtype == dtype else max(_WIDENED_BYTES // (head_VH.shape[1] * dtype.itemsize), 1)
    for start in range(0, rows, max(step, 1)):
        block = slice(start, min(start + step, rows))
        yield block, head_VH[block].to(dtype)


def logits_into(out_NV: Tensor, hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
    """Z = h W^T, overwriting and returning `out_NV`, accumulated in its dtype (fp32 or fp64)."""
    if _mixed_gemm(hidden_NH, head_VH):
        return torch.mm(hidden_NH, head_VH.T, out_dtype=out_NV.dtype, out=out_NV)  # type: ignore[call-overload]
    widened_NH = hidden_NH.to(out_NV.dtype)
    for block, rows_VH in _row_blocks(head_VH, out_NV.dtype):
        torch.mm(widened_NH, rows_VH.T, out=out_NV[:, block])
    return out_NV


def gradient_dtype(
    hidden_NH: Tensor, head_VH: Tensor, out_VH: Tensor | None, dtype: torch.dtype
) -> torch.dtype:
    """In which dtype both gradient products take the logit gradient without another copy of it.

    Args:
        out_VH: the head's gradient; None where it is not wanted.
        dtype: what it is computed in; the answer where a product widens its operands.
    """
    low = _mixed_gemm(head_VH, hidden_NH) and (out_VH is None or out_VH.dtype == torch.float32)
    return head_VH.dtype if low else dtype


def hidden_gradient_into(out_NH: Tensor, gradient_NV: Tensor, head_VH: Tensor) -> Tensor:
    """dh = G W, overwriting and returning `out_NH`; a partial sum over this rank's vocabulary rows."""
    if _mixed_gemm(head_VH):
        low_NV = gradient_NV.to(head_VH.dtype)
        return torch.mm(low_NV, head_VH, out_dtype=out_NH.dtype, out=out_NH)  # type: ignore[call-overload]
    out_NH.zero_()
    for block, rows_VH in _row_blocks(head_VH, gradient_NV.dtype):
        out_NH.addmm_(gradient_NV[:, block], rows_VH)
    return out_NH


def add_head_gradient(out_VH: Tensor, gradient_NV: Tensor, hidden_NH: Tensor) -> None:
    """dW += G^T h, in place, in any dtype of `out_VH`."""
    mixed = _mixed_gemm(hidden_NH)
    if mixed and out_VH.dtype == torch.float32:
        low_NV = gradient_NV.to(hidden_NH.dtype)
        if _adds_mixed(hidden_NH.device, hidden_NH.dtype):
            torch.addmm(out_VH, low_NV.T, hidden_NH, out_dtype=torch.float32, out=out_VH)  # type: ignore[call-overload]
            return
        rows = max(_SUMMED_BYTES // (out_VH.shape[1] * out_VH.itemsize), 1)
        for first in range(0, out_VH.shape[0], rows):
            block = slice(first, first + rows)
            out_VH[block] += torch.mm(low_NV[:, block].T, hidden_NH, out_dtype=torch.float32)  # type: ignore[call-overload]
        return
    widened_NH = hidden_NH.to(gradient_NV.dtype)
    if out_VH.dtype == gradient_NV.dtype:
        out_VH.addmm_(gradient_NV.T, widened_NH)
        return
    for block, rows_VH in _row_blocks(out_VH, gradient_NV.dtype):
        out_VH[block] = rows_VH.addmm(gradient_NV[:, block].T, widened_NH)
