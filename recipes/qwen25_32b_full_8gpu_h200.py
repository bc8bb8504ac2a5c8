"""Qwen2.5-32B: full fine-tuning, bf16, on one node of 8 H200."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_32b

MODEL = qwen25_32b.MODEL
GPU = "h200"


def fragment() -> dict[str, Any]:
    """Half the GPUs of `qwen25_32b`."""
    return base.combine(
        base.on_gpus(),
        # 590 GB on 8 GPUs are 74 GB each, the reference adds 8: the fewer tensor ranks, the less is exchanged.
        base.tensor_parallel(2),
        base.pipeline_parallel(4, vpp_size=4),
    )


finetune_recipe = base.finetune_recipe(__name__)
