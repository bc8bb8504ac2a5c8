"""Precisions as rows: what NeMo's mixed-precision plugin is told, and the dtypes that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from asft_nemo.config.schema import RunConfig
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


def reference_precision(run: RunConfig) -> str:
    """The precision the reference runs in: its own, or the policy's."""
    asked = run.reference.precision
    return run.precision if asked == "policy" else asked
