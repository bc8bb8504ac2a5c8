"""Mistral 7B and what has its shape (Nemo 12B, Small 24B): no biases; v0.1 attends to a window; head_dim may be a field of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.model import hf_fields
from asft_nemo.model.decoder import Traits


def traits(config: Mapping[str, Any]) -> Traits:
    """Returns what is special about a `MistralForCausalLM` config.json."""
    return Traits(num_query_groups=hf_fields.query_groups(config), head_dim=hf_fields.head_dim(config))
