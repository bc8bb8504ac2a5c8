"""Where the policy's head gradient goes: straight into Megatron's `main_grad`, where a DDP wrapper made one.

Megatron's DDP keeps one fp32 gradient per parameter and adds `param.grad` to it in a hook that autograd calls. For the head that means
an fp32 sum [V, H] kept from forward to backward, and in bf16 a rounded copy of it. Here the loss adds to `main_grad` itself, chunk by
chunk, while it visits the head in the forward pass.

That is in time: a training step zeroes `main_grad` before its first forward pass, and reduces it over data-parallel ranks only after the
last backward pass of the chunk, which every forward pass of the chunk precedes in each of Megatron's schedules.

Shapes: V this rank's vocabulary rows, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from asft_nemo.losses import HeadGradient


def into_main_grad(weight_VH: Tensor, config: Any) -> HeadGradient | None:
    """The sink of the head's gradient for one forward pass, or None: then it goes through autograd.

    Args:
        weight_VH: the head [V, H], or the embedding where the two are tied.
        config: the model's `AnchoredGPTConfig`, after NeMo has set it up.

    Returns:
        A sink over `weight_VH.main_grad`. None where gradients are disabled (validation, prepass), where the weight is frozen, where
        nobody made a `main_grad` (the frozen reference, a model used without DDP), where it is narrower than fp32 (every chunk would be
        rounded into it), and for Megatron-FSDP, which makes the gradient's buffer only in backward.
    """
    buffer_VH = getattr(weight_VH, "main_grad", None)
    if not torch.is_grad_enabled() or not weight_VH.requires_grad or hasattr(weight_VH, "__fsdp_param__"):
        return None
    if buffer_VH is None or torch.finfo(buffer_VH.dtype).bits < 32:
        return None
    return HeadGradient(buffer_VH, upstream_scale(config), partial(_returned, weight_VH, config))


def upstream_scale(config: Any) -> float | None:
    """What the loss sum is multiplied with before backward, where that is known during the forward pass.

    With `calculate_per_token_loss` and the 3-tuple of `TokenLossReduction` Megatron's schedules backpropagate the sum as it is, at any
    number of micro batches and any context-parallel size (`forward_step_calc_loss`, megatron-core 0.15.3), and NeMo's step multiplies
    nothing. The losses of experts and of multi-token prediction scale themselves and leave the sum alone.

    Returns:
        1, or None: ``normalize_by=micro_batch`` divides by each micro batch's own number of tokens, a `grad_scale_func` multiplies with
        the fp16 loss scale, and without `calculate_per_token_loss` the schedule divides.
    """
    as_it_is = config.normalize_by == "tokens" and config.calculate_per_token_loss
    return 1.0 if as_it_is and config.grad_scale_func is None else None


def _returned(weight_VH: Tensor, config: Any) -> Tensor | None:
    """What autograd gets as the head's gradient, for the hook of Megatron's DDP (`_make_backward_post_hook`, megatron-core 0.15.3).

    * Tied weights on one stage (`zero_out_wgrad`): nothing. The embedding's gradient of the same parameter comes through autograd, and
      the hook must find that alone and add it.
    * `overlap_grad_reduce` (only then is there a `no_sync_func`): the hook insists on a gradient, and must not run on autograd's CPU
      thread, where it does without one. It gets memory that was never written, and drops it because of `grad_added_to_main_grad`,
      which the next step's `zero_grad_buffer` takes back.
    * Else nothing: the hook passes over a parameter without a gradient.
    """
    if getattr(weight_VH, "zero_out_wgrad", False) or config.no_sync_func is None:
        return None
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight_VH)
