"""Qwen2.5-7B: full fine-tuning, bf16, on one node of 8 GPUs of 80 GB."""

from __future__ import annotations

from typing import Any

from . import base

MODEL = "Qwen/Qwen2.5-7B"


def fragment() -> dict[str, Any]:
    """28 layers, hidden 3584, 28 heads, 4 kv heads, untied embeddings; 7.6 B parameters."""
    # 6 bytes of weights and gradients x 7.6 B = 46 GB on one GPU leave no room for the optimizer, the reference and
    # activations; at TP 2 it is 23 GB, the optimizer shared by 4 data-parallel ranks 11 GB, the reference 8 GB.
    return base.one_node(2)


finetune_recipe = base.finetune_recipe(__name__)
