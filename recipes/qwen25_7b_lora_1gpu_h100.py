"""Qwen2.5-7B: LoRA, bf16, from one H100 on."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_7b

MODEL = qwen25_7b.MODEL


def fragment() -> dict[str, Any]:
    """One GPU holds it."""
    # 15 GB of frozen weights, 31 of 80 GiB in all.
    return base.lora()


finetune_recipe = base.finetune_recipe(__name__)
