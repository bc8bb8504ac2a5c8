"""Qwen2.5-32B: LoRA, bf16, on 4 H100."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_32b

MODEL = qwen25_32b.MODEL


def fragment() -> dict[str, Any]:
    """Half a node; whole nodes hold two such groups side by side."""
    return base.combine(
        base.lora(),
        # 65 GB of frozen weights: two GPUs hold them at TP 2, with nothing to spare at 4,096 tokens.
        base.tensor_parallel(2),
        # Stages gather no activations as TP 4 would: 11 % faster by the plan.
        base.pipeline_parallel(2, vpp_size=8),
    )


finetune_recipe = base.finetune_recipe(__name__)
