"""Qwen2.5-7B: full fine-tuning, bf16, on one node of 8 A100 of 40 GB."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_7b

MODEL = qwen25_7b.MODEL
GPU = "a100-40gb"


def fragment() -> dict[str, Any]:
    """The GPUs of `qwen25_7b` with half the memory."""
    # The most that 4 kv heads allow: weights, gradients and the reference are 15 GB of each GPU, the optimizer shared by two ranks 11.
    return base.one_node(4)


finetune_recipe = base.finetune_recipe(__name__)
