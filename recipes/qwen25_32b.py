"""Qwen2.5-32B: full fine-tuning, bf16, on 16 GPUs of 80 GB (two nodes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import base

if TYPE_CHECKING:
    import nemo_run

MODEL = "Qwen/Qwen2.5-32B"


def fragment() -> dict[str, Any]:
    """64 layers, hidden 5120, 40 heads, 8 kv heads, untied embeddings; 32.8 B parameters."""
    return base.combine(
        base.on_gpus(),
        # The whole node, and the most that 8 kv heads allow.
        base.tensor_parallel(8),
        {
            "parallel": {
                # 32.8 B x 18 bytes = 590 GB: 16 GPUs hold it at 37 GB each, the reference adds 4.
                "pp_size": 2,
                # 8 layers a virtual stage: the pipeline bubble is a quarter of the plain schedule's.
                "vpp_size": 4,
            }
        },
    )


def finetune_recipe(overrides: Sequence[str] = ()) -> nemo_run.Partial:
    """This recipe as a NeMo-Run task; see `base.finetune_partial`."""
    return base.finetune_partial("qwen25_32b", overrides)
