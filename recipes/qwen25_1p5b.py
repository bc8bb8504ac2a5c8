"""Qwen2.5-1.5B: full fine-tuning, bf16, from one GPU of 80 GB on."""

from __future__ import annotations

from typing import Any

from . import base

MODEL = "Qwen/Qwen2.5-1.5B"


def fragment() -> dict[str, Any]:
    """28 layers, hidden 1536, 12 heads, 2 kv heads, tied embeddings; 1.5 B parameters."""
    # 1.5 B parameters x 18 bytes (bf16 weights, fp32 gradients, masters, moments) = 28 GB, the reference 3 GB more:
    # one GPU holds it, and more GPUs are best spent on data parallelism.
    return base.on_gpus()


finetune_recipe = base.finetune_recipe(__name__)
