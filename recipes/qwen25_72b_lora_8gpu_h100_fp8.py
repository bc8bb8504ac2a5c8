"""Qwen2.5-72B: LoRA, FP8 with one scale a tensor, on 8 H100."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b_lora_8gpu_h100

MODEL = qwen25_72b_lora_8gpu_h100.MODEL


def fragment() -> dict[str, Any]:
    """The layout of `qwen25_72b_lora_8gpu_h100`."""
    # 59 of 80 GiB; 4,096 tokens do not fit without recompute.granularity=selective recompute.modules=[mlp].
    return base.combine(qwen25_72b_lora_8gpu_h100.fragment(), base.fp8("current"))


finetune_recipe = base.finetune_recipe(__name__)
