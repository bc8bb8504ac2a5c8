"""The planner's number for the head's gradient is what the fused loss allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asft_nemo.losses import HeadGradient, VocabShard, fused_linear_loss, head_gradient_bytes
from asft_nemo.objectives import objective

VOCAB, HIDDEN, TOKENS = 33, 5, 7


class AllocatedBytes(TorchDispatchMode):
    """Sums the bytes of new tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.total = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) == self.shape:
                new = tensor.untyped_storage().data_ptr() not in given
                self.total += tensor.nbytes if new else 0
        return out


@pytest.mark.parametrize(
    ("uses_main_grad", "scale_known", "dummy"),
    [
        (False, True, False),
        (True, True, False),
        (True, True, True),
        (True, False, False),
        (True, False, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_are_those_allocated(
    dtype: torch.dtype, uses_main_grad: bool, scale_known: bool, dummy: bool
) -> None:
    """Nothing of the head's shape is made beyond the number, and nothing less."""
    head_VH = torch.randn(VOCAB, HIDDEN).to(dtype).requires_grad_()
    hidden_TH = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    sink = None
    if uses_main_grad:
        sink = HeadGradient(
            torch.zeros(VOCAB, HIDDEN),
            1.0 if scale_known else None,
            (lambda: torch.empty_like(head_VH)) if dummy else (lambda: None),
        )
    with AllocatedBytes((VOCAB, HIDDEN)) as allocated:
        output = fused_linear_loss(
            hidden_TH,
            head_VH,
            torch.randint(VOCAB, (TOKENS,)),
            torch.ones(TOKENS, dtype=torch.bool),
            objective=objective("sft"),
            shard=VocabShard.full(VOCAB),
            head_gradient=sink,
        )
        output.loss_sum.backward()
    widened = (
        VOCAB * HIDDEN * 4 if dtype == torch.bfloat16 else 0
    )  # CPU: the head itself, twice, a block at a time
    expected = head_gradient_bytes(
        VOCAB,
        HIDDEN,
        weight_bytes=dtype.itemsize,
        uses_main_grad=uses_main_grad,
        scale_known=scale_known,
        dummy=dummy,
    )
    assert allocated.total - 2 * widened == expected


def test_unless_told_otherwise_the_factor_is_known_and_no_hook_wants_a_dummy() -> None:
    assert head_gradient_bytes(VOCAB, HIDDEN, weight_bytes=2, uses_main_grad=True) == 0
    assert head_gradient_bytes(VOCAB, HIDDEN, weight_bytes=2, uses_main_grad=False) == VOCAB * HIDDEN * 6
