"""Qwen2.5-1.5B: full fine-tuning, bf16, from one 80 GB GPU on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import base

if TYPE_CHECKING:
    import nemo_run

MODEL = "Qwen/Qwen2.5-1.5B"


def fragment() -> dict[str, Any]:
    """28 layers, hidden 1536, 12 heads, 2 kv heads, tied embeddings; 1.5 B parameters."""
    # 1.5 B parameters x 18 bytes (bf16 weights, fp32 gradients, masters, moments) = 28 GB, the reference 3 GB more:
    # one GPU holds it, and more GPUs are best spent on data parallelism.
    return base.on_gpus()


def finetune_recipe(overrides: Sequence[str] = ()) -> nemo_run.Partial:
    """This recipe as a NeMo-Run task; see `base.finetune_partial`."""
    return base.finetune_partial("qwen25_1p5b", overrides)
