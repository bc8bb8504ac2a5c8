"""Qwen2.5-72B: LoRA, bf16, on one node of 8 H100."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL


def fragment() -> dict[str, Any]:
    """The model of `qwen25_72b`."""
    # 42 of 80 GiB
    return base.lora_70b()


finetune_recipe = base.finetune_recipe(__name__)
