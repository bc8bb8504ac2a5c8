"""Qwen2.5-1.5B: LoRA, bf16, from one H100 on."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_1p5b

MODEL = qwen25_1p5b.MODEL


def fragment() -> dict[str, Any]:
    """One GPU holds it."""
    # 3 GB of frozen weights, 12 of 80 GiB in all.
    return base.lora()


finetune_recipe = base.finetune_recipe(__name__)
