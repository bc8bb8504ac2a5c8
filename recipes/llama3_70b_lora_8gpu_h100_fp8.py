"""Llama-3-70B: LoRA, FP8 with one scale a tensor, on 8 H100."""

from __future__ import annotations

from typing import Any

from . import base, llama3_70b_lora_8gpu_h100

MODEL = llama3_70b_lora_8gpu_h100.MODEL


def fragment() -> dict[str, Any]:
    """The layout of `llama3_70b_lora_8gpu_h100`."""
    # 58 of 80 GiB; 4,096 tokens leave 1 GiB without recompute.granularity=selective recompute.modules=[mlp].
    return base.combine(llama3_70b_lora_8gpu_h100.fragment(), base.fp8("current"))


finetune_recipe = base.finetune_recipe(__name__)
