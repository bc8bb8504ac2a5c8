"""The small model that ships with the project, on one machine without a GPU."""

from __future__ import annotations

from typing import Any

from . import base


def fragment() -> dict[str, Any]:
    """Qwen2 architecture, 4 layers, hidden 256, 4 heads, 2 kv heads; TP1 x PP1 unless told otherwise."""
    from asft_nemo.config.paths import project_dir

    return base.combine(
        base.fragment(),
        {
            "model": {"path": str(project_dir() / "assets" / "tiny-base")},
            # CPUs run fp32 faster than bf16, and the weights are small.
            "precision": "fp32",
            # A trained-from-scratch small model moves with larger steps than a 7B one.
            "optim": {"lr": 5e-4},
            # Holds 99.9 % of the GSM8K rows under the small byte-level vocabulary.
            "data": {"sequence_length": 1024},
            # Four micro batches a step also fill an interleaved two-stage pipeline.
            "trainer": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 50},
        },
    )


finetune_recipe = base.finetune_recipe(__name__)
