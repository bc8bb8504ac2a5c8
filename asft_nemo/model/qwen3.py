"""Qwen3 dense, 0.6B to 32B: queries and keys normalised per head, no biases; tied up to 4B.

A head has 128 channels whatever the hidden size, so the attention may be wider than the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.model import hf_fields
from asft_nemo.model.decoder import Traits


def traits(config: Mapping[str, Any]) -> Traits:
    """Returns what is special about a `Qwen3ForCausalLM` config.json."""
    bias = hf_fields.optional_bool(config, "attention_bias", False)
    return Traits(
        num_query_groups=hf_fields.query_groups(config),
        head_dim=hf_fields.required_int({"head_dim": 128, **config}, "head_dim"),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
