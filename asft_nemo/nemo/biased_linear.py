"""A linear layer whose bias is added before the product is rounded, for Megatron's local layers.

Megatron's own rounds twice in bf16, once after the product and once after the bias (`output = torch.matmul(...); output = output + bias`,
megatron/core/tensor_parallel/layers.py, megatron-core 0.15.3). On queries, keys and values, the only products of these models with a bias,
that made the error of all gradients 1.24 times that of transformers (docs/memory_and_speed.md). cuBLAS, oneDNN and Transformer Engine add
the bias to the fp32 sum: one kernel and one copy of the product less. Backward is Megatron's.

Shapes: S sequence (this rank's part of it under sequence parallelism), B micro batch, H columns of the weight, O its rows on this rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import (
    LinearWithFrozenWeight,
    LinearWithGradAccumulationAndAsyncCommunication,
    custom_fwd,
    dist_all_gather_func,
    get_global_memory_buffer,
)
from torch import Tensor
from torch.nn.functional import linear


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, with x W^T + b in one product; without a bias it is Megatron's alone."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments and collectives are those of Megatron's `linear_with_grad_accumulation_and_async_allreduce`."""
        bias = kwargs.get("bias")
        if bias is None:
            return super()._forward_impl(input, weight, *args, **kwargs)
        allreduce_dgrad, sequence_parallel = kwargs["allreduce_dgrad"], kwargs["sequence_parallel"]
        group = kwargs["tp_group"]
        if weight.requires_grad:
            # the two Nones put weight gradients off (`defer_embedding_wgrad_compute`), which is of the output layer alone
            fused = kwargs["gradient_accumulation_fusion"]
            return _Trained.apply(
                input, weight, bias, fused, allreduce_dgrad, sequence_parallel, None, None, group
            )  # type: ignore[return-value]
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        return _Frozen.apply(input, weight, bias, allreduce_dgrad, group)  # type: ignore[return-value]


class _Trained(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's function with another forward pass; it keeps what Megatron's backward reads."""

    @staticmethod
    @custom_fwd
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: None,
        wgrad_deferral_limit: None,
        tp_group: Any,
    ) -> Tensor:
        """[S, B, H] to [S, B, O]; under sequence parallelism to all ranks' S, by one all-gather of the input."""
        ctx.save_for_backward(input, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias = True
        ctx.gradient_accumulation_fusion = gradient_accumulation_fusion
        ctx.allreduce_dgrad = allreduce_dgrad
        ctx.sequence_parallel = sequence_parallel
        ctx.wgrad_deferral_limit = wgrad_deferral_limit
        ctx.grad_output_buffer = grad_output_buffer
        ctx.tp_group = tp_group
        if sequence_parallel:
            shape = [input.shape[0] * tp_group.size(), *input.shape[1:]]
            whole = get_global_memory_buffer().get_tensor(shape, input.dtype, "mpu")
            dist_all_gather_func(whole, input, group=tp_group)
            input = whole
        return linear(input, weight, bias)


class _Frozen(LinearWithFrozenWeight):
    """The same for a weight without a gradient, as LoRA leaves it."""

    @staticmethod
    @custom_fwd
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, allreduce_dgrad: bool, tp_group: Any
    ) -> Tensor:
        """[S, B, H] to [S, B, O]."""
        ctx.save_for_backward(weight)
        ctx.allreduce_dgrad, ctx.tp_group = allreduce_dgrad, tp_group
        return linear(input, weight, bias)
