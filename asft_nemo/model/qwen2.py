"""Qwen2 and Qwen2.5, 0.5B to 72B, base, Instruct, Math and Coder: biases on q, k, v; tied up to 3B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.errors import CheckpointError
from asft_nemo.model import hf_fields
from asft_nemo.model.spec import ModelSpec


def read(config: Mapping[str, Any]) -> ModelSpec:
    """Returns the spec of a `Qwen2ForCausalLM` config.json.

    Fields that a config.json may leave out take the values of transformers' `Qwen2Config`.

    Raises:
        CheckpointError: a field is missing or malformed, or asks for what the training stack cannot do.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"config.json: hidden_act={config['hidden_act']!r} is not supported: Qwen2 models use 'silu'"
        )
    if hf_fields.optional_bool(config, "use_sliding_window", False):
        raise CheckpointError(
            "config.json: use_sliding_window=true is not supported: set it to false and train on sequences"
            " shorter"
            f" than the window of {config.get('sliding_window')} tokens"
        )
    theta, scaling = hf_fields.rope(config, 10_000.0)
    return ModelSpec(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        num_layers=hf_fields.required_int(config, "num_hidden_layers"),
        hidden_size=hf_fields.required_int(config, "hidden_size"),
        ffn_hidden_size=hf_fields.required_int(config, "intermediate_size"),
        num_attention_heads=hf_fields.required_int(config, "num_attention_heads"),
        num_query_groups=hf_fields.required_int(config, "num_key_value_heads"),
        head_dim=hf_fields.head_dim(config),
        vocab_size=hf_fields.required_int(config, "vocab_size"),
        norm_epsilon=hf_fields.optional_number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=hf_fields.required_int(config, "max_position_embeddings"),
        tie_word_embeddings=hf_fields.optional_bool(config, "tie_word_embeddings", False),
        qkv_bias=True,
        qk_norm=False,
        attention_dropout=hf_fields.optional_number(config, "attention_dropout", 0.0),
        initializer_range=hf_fields.optional_number(config, "initializer_range", 0.02),
    )
