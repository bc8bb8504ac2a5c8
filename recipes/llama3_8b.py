"""Llama-3-8B: full fine-tuning, bf16, on one node of 8 GPUs of 80 GB."""

from __future__ import annotations

from typing import Any

from . import base

MODEL = "meta-llama/Meta-Llama-3-8B"


def fragment() -> dict[str, Any]:
    """32 layers, hidden 4096, 32 heads, 8 kv heads, untied embeddings; 8.0 B parameters."""
    # 6 bytes of weights and gradients x 8 B = 48 GB on one GPU leave no room for the rest; at TP 2 all of it needs 51 GiB.
    return base.one_node(2)


finetune_recipe = base.finetune_recipe(__name__)
