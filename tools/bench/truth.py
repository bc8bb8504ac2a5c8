"""The fused loss against the dense fp64 oracle, on the device that is asked: how far off, in which dtype, with which kernels."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from asft_nemo.losses import LossOutput, VocabShard, dense_loss, fused_linear_loss
from asft_nemo.losses.triton import use_triton
from asft_nemo.losses.triton.dispatch import VARIABLE
from asft_nemo.objectives import Objective, objective
from bench.contenders import KL_WEIGHT, Case, Tensors, make_tensors

OBJECTIVES = {
    "sft": objective("sft"),
    "asft, forward KL": objective("asft", kl_weight=KL_WEIGHT),
    "asft, reverse KL": objective("asft", kl_weight=KL_WEIGHT, kl_direction="reverse"),
}
# Relative errors that count as right: sums in fp32 (8 digits less what thousands of terms cost), and a gradient returned in bf16
# (8 bits: half a unit in the last place is at most 2^-9 of a number, in norm about half of that).
LOSS_BOUND = 1e-5
GRADIENT_BOUNDS = {"fp32": 1e-5, "bf16": 2**-8}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        objective, dtype: what was computed, from inputs of which dtype.
        triton: with the Triton kernels.
        loss, dhidden, dhead: errors relative to the oracle's, gradients in norm.
        naive_dhidden, naive_dhead: those of the definition computed in `dtype` itself (logits rounded to it).
        skipped: why it could not be computed; the errors mean nothing then.
    """

    objective: str
    dtype: str
    triton: bool
    loss: float = float("nan")
    dhidden: float = float("nan")
    dhead: float = float("nan")
    naive_dhidden: float = float("nan")
    naive_dhead: float = float("nan")
    skipped: str | None = None

    @property
    def right(self) -> bool:
        """Whether all errors are within the bounds; a skipped check is neither right nor wrong and counts as right."""
        bound = GRADIENT_BOUNDS[self.dtype]
        return self.skipped is not None or (
            self.loss <= LOSS_BOUND and self.dhidden <= bound and self.dhead <= bound
        )

    def record(self) -> dict[str, object]:
        """For the JSON file, which has null for what is no number."""
        values = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }
        return {**values, "right": self.right}


@contextlib.contextmanager
def triton_set_to(on: bool) -> Iterator[None]:
    """The loss's own switch, put back afterwards."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _gradients(
    loss: Callable[[Tensor, Tensor], LossOutput], tensors: Tensors
) -> tuple[float, Tensor, Tensor]:
    hidden_TH = tensors.hidden_TH.detach().clone().requires_grad_()
    head_VH = tensors.head_VH.detach().clone().requires_grad_()
    output = loss(hidden_TH, head_VH)
    output.loss_sum.backward()
    assert hidden_TH.grad is not None
    assert head_VH.grad is not None
    return output.loss_sum.item(), hidden_TH.grad, head_VH.grad


def _dense(
    tensors: Tensors, mask_T: Tensor, chosen: Objective, dtype: torch.dtype
) -> tuple[float, Tensor, Tensor]:
    def loss(hidden_TH: Tensor, head_VH: Tensor) -> LossOutput:
        return dense_loss(
            hidden_TH.to(dtype) @ head_VH.to(dtype).T,
            tensors.labels_T,
            mask_T,
            objective=chosen,
            ref_logits_TV=tensors.ref_hidden_TH.to(dtype) @ tensors.ref_head_VH.to(dtype).T,
        )

    wide = replace(tensors, hidden_TH=tensors.hidden_TH.to(dtype), head_VH=tensors.head_VH.to(dtype))
    return _gradients(loss, wide)


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def check(name: str, case: Case, *, triton: bool) -> Check:
    """One objective in one dtype, with the Triton kernels or without; every fifth token does not count."""
    chosen, tensors = OBJECTIVES[name], make_tensors(case)
    mask_T = torch.arange(case.tokens, device=case.device) % 5 != 0
    with triton_set_to(triton):
        if triton and not use_triton(torch.empty(1, 1, device=case.device)):
            why = "Triton's kernels do not run on this device"
            return Check(name, case.dtype, triton, skipped=why)
        loss, dhidden_TH, dhead_VH = _gradients(
            lambda hidden_TH, head_VH: fused_linear_loss(
                hidden_TH,
                head_VH,
                tensors.labels_T,
                mask_T,
                objective=chosen,
                shard=VocabShard.full(case.vocab),
                ref_hidden_TH=tensors.ref_hidden_TH,
                ref_head_VH=tensors.ref_head_VH,
                chunk_tokens=case.chunk_tokens,
            ),
            tensors,
        )
    exact_loss, exact_dhidden_TH, exact_dhead_VH = _dense(tensors, mask_T, chosen, torch.float64)
    _, naive_dhidden_TH, naive_dhead_VH = _dense(tensors, mask_T, chosen, tensors.hidden_TH.dtype)
    return Check(
        name,
        case.dtype,
        triton,
        loss=abs(loss / exact_loss - 1),
        dhidden=_error(dhidden_TH, exact_dhidden_TH),
        dhead=_error(dhead_VH, exact_dhead_VH),
        naive_dhidden=_error(naive_dhidden_TH, exact_dhidden_TH),
        naive_dhead=_error(naive_dhead_VH, exact_dhead_VH),
    )


def checks(*, tokens: int, vocab: int, hidden: int, device: str) -> list[Check]:
    """All objectives, dtypes and kernels; chunks of a size that divides nothing."""
    return [
        check(
            name,
            Case(tokens, vocab, hidden, dtype, objective="asft", chunk_tokens=tokens // 3 + 1, device=device),
            triton=triton,
        )
        for name in OBJECTIVES
        for dtype in GRADIENT_BOUNDS
        for triton in (True, False)
    ]
