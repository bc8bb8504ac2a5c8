"""Qwen2.5-72B: LoRA, bf16, on one node of 8 H100."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL


def fragment() -> dict[str, Any]:
    """The model of `qwen25_72b`."""
    return base.combine(
        base.on_gpus(),
        base.lora(),
        # TP 2 with four stages is faster by the plan and does not fit at 4,096 tokens: adapters keep the gathered tokens.
        base.tensor_parallel(4),
        # The other half of the node, instead of a second copy of the frozen weights: 42 of 80 GiB.
        base.pipeline_parallel(2, vpp_size=10),
    )


finetune_recipe = base.finetune_recipe(__name__)
