"""Qwen2 and Qwen2.5, 0.5B to 72B, base, Instruct, Math and Coder: biases on q, k, v; tied up to 3B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.model import hf_fields
from asft_nemo.model.decoder import Traits


def traits(config: Mapping[str, Any]) -> Traits:
    """Returns what is special about a `Qwen2ForCausalLM` config.json."""
    return Traits(
        num_query_groups=hf_fields.query_groups(config),
        head_dim=hf_fields.head_dim(config),
        qkv_bias=True,
    )
