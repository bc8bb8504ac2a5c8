"""LLaMA-2-7B: LoRA, bf16, from one H100 on."""

from __future__ import annotations

from typing import Any

from . import base, llama2_7b

MODEL = llama2_7b.MODEL


def fragment() -> dict[str, Any]:
    """One GPU holds it."""
    # 13 GB of frozen weights, 29 of 80 GiB in all.
    return base.lora()


finetune_recipe = base.finetune_recipe(__name__)
