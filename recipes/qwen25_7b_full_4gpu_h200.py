"""Qwen2.5-7B: full fine-tuning, bf16, on 4 H200."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_7b

MODEL = qwen25_7b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_7b`, each 12 % faster by the plan than an H100."""
    # 141 GB hold the whole model with its gradients and the reference (61 GB): nothing is exchanged inside layers.
    # The optimizer shared by 4 data-parallel ranks is 23 GB.
    return base.combine(base.on_gpus(), {"run": {"world_size": 4}})


finetune_recipe = base.finetune_recipe(__name__)
