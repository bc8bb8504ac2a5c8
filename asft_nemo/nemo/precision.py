"""Precisions as rows: what NeMo's mixed-precision plugin is told, and the dtypes that follow.

What is FP8 in the FP8 rows: the products of the linear layers inside the transformer layers, forward and backward, in Transformer Engine's
modules. Megatron opens the FP8 context around each layer (around all of them with delayed scaling) in `TransformerBlock.forward` and closes
it before the final norm (megatron/core/transformer/transformer_block.py, megatron-core 0.15.3), so that embedding, final norm, head and
loss never see it; they are not Transformer Engine's linear layers either. Attention's own products stay in bf16 (`fp8_dot_product_attention`
False), and so do norms and residuals.

What is not: parameters are bf16, their masters and gradients fp32, in every row but `fp8`, which is of a frozen reference alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from asft_nemo.config.fp8 import FP8, Fp8, dotted, fp8_missing, fp8_refusal
from asft_nemo.config.fp8 import reference_precision as reference_precision
from asft_nemo.cpu import backend
from asft_nemo.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """One row.

    Attributes:
        compute_dtype: dtype of parameters and activations in forward and backward; masters and gradients are fp32.
        plugin: arguments of NeMo's MegatronMixedPrecision, None where Lightning's plain fp32 serves.
        fp8: what its kernels need, None where it has no FP8.
    """

    compute_dtype: torch.dtype
    plugin: dict[str, Any] | None
    fp8: Fp8 | None = None


# As NeMo's `bf16_mixed` (nemo/collections/llm/recipes/precision/mixed_precision.py, nemo 2.7.3).
_BF16: dict[str, Any] = {
    "precision": "bf16-mixed",
    # NeMo's default is fp32: layers would be made in fp32 and then cast, and an FP8 weight that stands for fp32 would be cast to a plain tensor
    "params_dtype": torch.bfloat16,
    "grad_reduce_in_fp32": True,
}
# As NeMo's `bf16_with_fp8_*` recipes but for one thing: a trained policy's parameters stay in bf16 and are cast for every step. With
# parameters in FP8 (`fp8_param_gather`) NeMo makes the fp32 masters from the loaded parameters, that is from FP8's rounding of the base,
# and fine-tuning would start from, and export, another model than the one it was given. The price is 2 bytes a parameter, and gathering
# parameters in bf16. hybrid: e4m3 in forward, e5m2, with the larger range, for gradients of outputs.
_FP8: dict[str, Any] = {**_BF16, "fp8": "hybrid", "fp8_param_gather": False}
# Tensors with one scale each lose most in the first and the last layer: NeMo's recipe for current scaling leaves them in bf16.
_EDGES_IN_BF16 = {
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": FP8["fp8_current"].edge_layers_in_bf16,
    "num_layers_at_end_in_bf16": FP8["fp8_current"].edge_layers_in_bf16,
}

PRECISIONS = {
    "fp32": Precision(torch.float32, None),
    "bf16": Precision(torch.bfloat16, _BF16),
    # One scale a tensor, from the tensor itself: a pass leaves no trace in the next. NeMo's `bf16_with_fp8_current_scaling_mixed`.
    "fp8_current": Precision(
        torch.bfloat16, {**_FP8, "fp8_recipe": "tensorwise", **_EDGES_IN_BF16}, FP8["fp8_current"]
    ),
    # One scale for 128 x 128 numbers of a weight and for 1 x 128 of an activation or gradient, from the block itself; with scales that
    # fine no layer is left out. NeMo's `bf16_with_fp8_subchannel_scaling_mixed`.
    "fp8_blockwise": Precision(torch.bfloat16, {**_FP8, "fp8_recipe": "blockwise"}, FP8["fp8_blockwise"]),
    # One scale a tensor, from the largest numbers of the last 1024 passes. Megatron refuses layers in bf16 with it. NeMo's `bf16_with_fp8_mixed`.
    "fp8_delayed": Precision(
        torch.bfloat16,
        {
            **_FP8,
            "fp8_recipe": "delayed",
            "fp8_margin": 0,
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        },
        FP8["fp8_delayed"],
    ),
    # Of a frozen reference alone (`reference.precision`): current scaling again, and the weights themselves in FP8, 1 byte each
    # (`fp8_param_gather` becomes TransformerConfig.fp8_param), for nothing is made from them but products.
    "fp8": Precision(
        torch.bfloat16,
        {**_FP8, "fp8_recipe": "tensorwise", **_EDGES_IN_BF16, "fp8_param_gather": True},
        FP8["fp8"],
    ),
}


def precision_row(name: str) -> Precision:
    """The row called `name`.

    Raises:
        ConfigError: an unknown precision.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name} is not built: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def precision_plugin(name: str) -> MegatronMixedPrecision | None:
    """NeMo's plugin for this precision, or None for plain fp32."""
    arguments = precision_row(name).plugin
    return None if arguments is None else MegatronMixedPrecision(**arguments)


def optimizer_precision(name: str) -> dict[str, Any]:
    """Arguments of Megatron's OptimizerConfig.

    NeMo's plugin writes them a second time, after `OptimizerConfig.__post_init__` has already chosen from `fp8_recipe` how masters are kept
    beside precision-aware optimizers.
    """
    row = precision_row(name)
    recipe = None if row.fp8 is None or row.plugin is None else row.plugin["fp8_recipe"]
    return {"bf16": name != "fp32", "params_dtype": row.compute_dtype, "fp8_recipe": recipe}


def require_kernels(name: str) -> None:
    """Refuses FP8 where it would not be computed: without Transformer Engine, Megatron's FP8 contexts do nothing at all and say nothing.

    Args:
        name: a row of `PRECISIONS`; one without FP8 passes.

    Raises:
        ConfigError: no GPU, or an older one than the row's kernels need; no Transformer Engine, or an older one; an older CUDA.
    """
    row = precision_row(name).fp8
    if row is None:
        return
    missing = "GPU" if backend.active() else fp8_missing(name)
    if missing is None and torch.cuda.get_device_capability() < row.compute_capability:
        missing = f"GPU of compute capability {dotted(row.compute_capability)} or higher"
    if missing is None and row.cuda is not None and _cuda() < row.cuda:
        missing = f"torch for CUDA {dotted(row.cuda)} or newer"
    if missing is not None:
        raise ConfigError(fp8_refusal(name, missing))


def _cuda() -> tuple[int, ...]:
    """The CUDA that torch was built for."""
    return tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])  # pyright: ignore[reportAttributeAccessIssue]
