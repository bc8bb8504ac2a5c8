"""Llama-3-8B: LoRA, bf16, from one H100 on."""

from __future__ import annotations

from typing import Any

from . import base, llama3_8b

MODEL = llama3_8b.MODEL


def fragment() -> dict[str, Any]:
    """One GPU holds it."""
    # 16 GB of frozen weights, 32 of 80 GiB in all.
    return base.lora()


finetune_recipe = base.finetune_recipe(__name__)
