"""Qwen2.5-72B: full fine-tuning, bf16, on 16 H200 (two nodes)."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_72b`."""
    return base.combine(
        base.on_gpus(),
        # 108 of 140 GiB: 141 GB leave room for half the tensor ranks of `qwen25_72b`, whose exchanges are not hidden.
        base.tensor_parallel(4),
        base.pipeline_parallel(4, vpp_size=5),
    )


finetune_recipe = base.finetune_recipe(__name__)
