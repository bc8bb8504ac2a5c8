"""LLaMA-2, 7B to 70B, and Llama 3, 3.1, 3.2 and 3.3, 1B to 405B: no biases; 3.1 and later scale the rotary embedding; 3.2 is tied.

The same class may ask for biases on all four attention projections (`attention_bias`) or in the MLP (`mlp_bias`); Meta's models do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.model import hf_fields
from asft_nemo.model.decoder import Traits


def traits(config: Mapping[str, Any]) -> Traits:
    """Returns what is special about a `LlamaForCausalLM` config.json."""
    bias = hf_fields.optional_bool(config, "attention_bias", False)
    return Traits(
        # the 7B and 13B models, where every query head has its own keys, may leave the number out
        num_query_groups=hf_fields.query_groups(config, absent="num_attention_heads"),
        head_dim=hf_fields.head_dim(config),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=hf_fields.optional_bool(config, "mlp_bias", False),
    )
