"""LLaMA-2-7B: full fine-tuning, bf16, on one node of 8 GPUs of 80 GB."""

from __future__ import annotations

from typing import Any

from . import base

MODEL = "meta-llama/Llama-2-7b-hf"


def fragment() -> dict[str, Any]:
    """32 layers, hidden 4096, 32 heads, 32 kv heads, untied embeddings; 6.7 B parameters."""
    # Undivided it needs 75 of 80 GiB at 2,048 tokens and does not fit at 4,096; at TP 2 it is 44, and 8 % slower by the plan.
    return base.one_node(2)


finetune_recipe = base.finetune_recipe(__name__)
