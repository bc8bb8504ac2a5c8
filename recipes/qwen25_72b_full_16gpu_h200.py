"""Qwen2.5-72B: full fine-tuning, bf16, on 16 H200 (two nodes)."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_72b`."""
    # 108 of 140 GiB
    return base.half_on_h200(qwen25_72b.fragment())


finetune_recipe = base.finetune_recipe(__name__)
