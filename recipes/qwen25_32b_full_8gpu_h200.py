"""Qwen2.5-32B: full fine-tuning, bf16, on one node of 8 H200."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_32b

MODEL = qwen25_32b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_32b`."""
    # 590 GB on 8 GPUs are 74 GB each, the reference adds 8.
    return base.half_on_h200(qwen25_32b.fragment())


finetune_recipe = base.finetune_recipe(__name__)
