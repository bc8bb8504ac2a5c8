"""Llama-3-70B: full fine-tuning, bf16, on 16 H200 (two nodes)."""

from __future__ import annotations

from typing import Any

from . import base, llama3_70b

MODEL = llama3_70b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `llama3_70b`."""
    # 105 of 140 GiB
    return base.half_on_h200(llama3_70b.fragment())


finetune_recipe = base.finetune_recipe(__name__)
