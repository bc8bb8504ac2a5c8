"""What the families share: everything in a decoder's config.json but the few traits that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asft_nemo.config.model_shape import attention_window
from asft_nemo.errors import CheckpointError
from asft_nemo.model import hf_fields
from asft_nemo.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a family reads from a config.json in a way of its own; the fields are those of `ModelSpec`."""

    num_query_groups: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_decoder(config: Mapping[str, Any], *, family: str, architecture: str, traits: Traits) -> ModelSpec:
    """Returns the spec of a config.json.

    Fields that a config.json may leave out take the values of transformers' own classes, which agree here.

    Args:
        config: the parsed config.json.
        family: the family's name in this project.
        architecture: the Hugging Face class.
        traits: what the family's own page has read.

    Raises:
        CheckpointError: a field is missing or malformed, or the head counts do not fit together.
    """
    heads = hf_fields.required_int(config, "num_attention_heads")
    if heads % traits.num_query_groups:
        raise CheckpointError(
            f"config.json: num_attention_heads={heads} is no multiple of"
            f" num_key_value_heads={traits.num_query_groups}: take config.json from the original model"
        )
    theta, scaling = hf_fields.rope(config, 10_000.0)
    return ModelSpec(
        family=family,
        architecture=architecture,
        num_layers=hf_fields.required_int(config, "num_hidden_layers"),
        hidden_size=hf_fields.required_int(config, "hidden_size"),
        ffn_hidden_size=hf_fields.required_int(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=traits.num_query_groups,
        head_dim=traits.head_dim,
        vocab_size=hf_fields.required_int(config, "vocab_size"),
        norm_epsilon=hf_fields.optional_number(config, "rms_norm_eps", 1e-6),
        hidden_act=hf_fields.optional_text(config, "hidden_act", "silu"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=hf_fields.required_int(config, "max_position_embeddings"),
        attention_window=attention_window(config),
        tie_word_embeddings=hf_fields.optional_bool(config, "tie_word_embeddings", False),
        qkv_bias=traits.qkv_bias,
        output_bias=traits.output_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        attention_dropout=hf_fields.optional_number(config, "attention_dropout", 0.0),
        initializer_range=hf_fields.optional_number(config, "initializer_range", 0.02),
    )
