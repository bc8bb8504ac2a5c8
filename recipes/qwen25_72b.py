"""Qwen2.5-72B: full fine-tuning, bf16, on 32 GPUs of 80 GB (four nodes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import base

if TYPE_CHECKING:
    import nemo_run

MODEL = "Qwen/Qwen2.5-72B"


def fragment() -> dict[str, Any]:
    """80 layers, hidden 8192, 64 heads, 8 kv heads, untied embeddings; 72.7 B parameters."""
    return base.combine(
        base.on_gpus(),
        # The whole node, and the most that 8 kv heads allow.
        base.tensor_parallel(8),
        {
            "parallel": {
                # 72.7 B x 18 bytes = 1.3 TB: 32 GPUs hold it at 41 GB each, the reference adds 4.5.
                "pp_size": 4,
                # 4 layers a virtual stage: the pipeline bubble is a fifth of the plain schedule's.
                "vpp_size": 5,
            }
        },
    )


def finetune_recipe(overrides: Sequence[str] = ()) -> nemo_run.Partial:
    """This recipe as a NeMo-Run task; see `base.finetune_partial`."""
    return base.finetune_partial("qwen25_72b", overrides)
