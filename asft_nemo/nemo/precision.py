"""Precisions as rows: what NeMo's mixed-precision plugin is told, and the dtypes that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import is_te_min_version
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from asft_nemo.config.fp8 import fp8_missing, fp8_refusal
from asft_nemo.config.schema import RunConfig
from asft_nemo.cpu import backend
from asft_nemo.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """One row.

    Attributes:
        compute_dtype: dtype of parameters and activations in forward and backward; masters and gradients are fp32.
        plugin: arguments of NeMo's MegatronMixedPrecision, None where Lightning's plain fp32 serves.
    """

    compute_dtype: torch.dtype
    plugin: dict[str, Any] | None


PRECISIONS = {
    "fp32": Precision(torch.float32, None),
    "bf16": Precision(torch.bfloat16, {"precision": "bf16-mixed", "grad_reduce_in_fp32": True}),
    # Of a frozen reference alone (`reference.precision`). The linear layers of NeMo's `bf16_with_fp8_current_scaling_mixed` (nemo 2.7.3):
    # one scale a tensor, from the tensor itself, so that a pass leaves no trace in the next; first and last layer in bf16. Embedding,
    # head, norms and attention's products are not Transformer Engine's linear layers and stay bf16.
    "fp8": Precision(
        torch.bfloat16,
        {
            "precision": "bf16-mixed",
            # NeMo's default is fp32, and `.to(bfloat16)` of an FP8 weight that stands for fp32 would make it a plain tensor
            "params_dtype": torch.bfloat16,
            "grad_reduce_in_fp32": True,
            "fp8": "hybrid",  # e4m3 in forward, which is all there is
            "fp8_recipe": "tensorwise",
            "fp8_param_gather": True,  # becomes TransformerConfig.fp8_param: the weights themselves are FP8, 1 byte each
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        },
    ),
}
# of Transformer Engine with current scaling: `get_fp8_recipe` in megatron/core/fp8_utils.py (megatron-core 0.15.3)
_TENSORWISE_SINCE = "2.2.0.dev0"


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


def require_fp8_kernels() -> None:
    """Refuses FP8 where it would not be computed: without Transformer Engine, Megatron's FP8 contexts do nothing at all and say nothing.

    Raises:
        ConfigError: no GPU, or one before compute capability 8.9; no Transformer Engine, or one without current scaling.
    """
    missing = "GPU" if backend.active() else fp8_missing()
    if missing is not None:
        raise ConfigError(fp8_refusal(missing))
    if not is_te_min_version(_TENSORWISE_SINCE):
        raise ConfigError(fp8_refusal("Transformer Engine of version 2.2 or newer"))
    if torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(fp8_refusal("GPU of compute capability 8.9 or higher"))


def reference_precision(run: RunConfig) -> str:
    """The precision the reference runs in, a row of `PRECISIONS`: its own, or the policy's."""
    asked = run.reference.precision
    return run.precision if asked == "policy" else asked
