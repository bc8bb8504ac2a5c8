"""Qwen2.5-72B: full fine-tuning, FP8 with a scale a block, on 32 H100."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL


def fragment() -> dict[str, Any]:
    """The layout of `qwen25_72b`."""
    # 61 of 80 GiB; no layer stays in bf16.
    return base.combine(qwen25_72b.fragment(), base.fp8("blockwise"))


finetune_recipe = base.finetune_recipe(__name__)
