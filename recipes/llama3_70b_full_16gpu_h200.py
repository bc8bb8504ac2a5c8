"""Llama-3-70B: full fine-tuning, bf16, on 16 H200 (two nodes)."""

from __future__ import annotations

from typing import Any

from . import base, llama3_70b

MODEL = llama3_70b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `llama3_70b`."""
    return base.combine(
        base.on_gpus(),
        # 105 of 140 GiB: 141 GB leave room for half the tensor ranks of `llama3_70b`, whose exchanges are not hidden.
        base.tensor_parallel(4),
        base.pipeline_parallel(4, vpp_size=5),
    )


finetune_recipe = base.finetune_recipe(__name__)
