"""Qwen2.5-72B at sequences of 32,768 tokens: full fine-tuning, bf16, on 64 GPUs of 80 GB (eight nodes)."""

from __future__ import annotations

from typing import Any

from . import base, qwen25_72b

MODEL = qwen25_72b.MODEL


def fragment() -> dict[str, Any]:
    """The layers of `qwen25_72b` on twice the GPUs: 32,768 is within the model's positions, and every row is shared by two of them."""
    return base.combine(
        qwen25_72b.fragment(),
        {
            "data": {
                "sequence_length": 32768,
                # Few examples are that long: unpacked, the others would be padded to it.
                "packing": True,
            },
            # Half of a row's tokens on each GPU, and half of the optimizer's state, which context-parallel ranks share too.
            "parallel": {"cp_size": 2},
            # The widest activations of a layer: without them 15 GiB wait for their backward pass instead of 49, which would not fit.
            # This costs 9 % of the speed; whole layers would save 13 GiB more and cost 19 %.
            "recompute": {"granularity": "selective", "modules": ["mlp"]},
        },
        # A packed row holds a hundred examples of 300 tokens: 100,000 of them are 916 rows, which the schema's batch of 64 makes 15 steps an
        # epoch of 2.1 million tokens each. 16 rows make it 58 of half a million, and are four rounds of the four stages, which one more
        # data-parallel rank divides still: 3.5 % of training are pipeline bubble (64 rows: 0.9 %, 8 rows: 6.8 %), which costs 3 % of the speed.
        {"trainer": {"global_batch_size": 16}},
        # 27 minutes by the plan
        base.checkpointed(100),
    )


finetune_recipe = base.finetune_recipe(__name__)
