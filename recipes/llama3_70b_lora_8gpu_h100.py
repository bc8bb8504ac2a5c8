"""Llama-3-70B: LoRA, bf16, on one node of 8 H100."""

from __future__ import annotations

from typing import Any

from . import base, llama3_70b

MODEL = llama3_70b.MODEL


def fragment() -> dict[str, Any]:
    """The model of `llama3_70b`."""
    # 41 of 80 GiB
    return base.lora_70b()


finetune_recipe = base.finetune_recipe(__name__)
