"""Qwen2.5-72B: LoRA, bf16, on 4 H200."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b_lora_8gpu_h100

MODEL = qwen25_72b_lora_8gpu_h100.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_72b_lora_8gpu_h100`."""
    # 145 GB of frozen weights and the adapters' gathered tokens: 73 of 140 GiB, 107 at 4,096 tokens.
    return base.half_on_h200(qwen25_72b_lora_8gpu_h100.fragment())


finetune_recipe = base.finetune_recipe(__name__)
