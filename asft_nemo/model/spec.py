"""The plain values that describe a decoder-only transformer, whatever wrote its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's architecture, read from a Hugging Face `config.json` by its family.

    Attributes:
        family: key of the family table that read it, for example `qwen2`.
        architecture: the Hugging Face class, for example `Qwen2ForCausalLM`.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of one of the two halves of the gated MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: channels of one head (Megatron's `kv_channels`); need not be hidden_size /
            num_attention_heads.
        vocab_size: rows of the embedding in the Hugging Face checkpoint, without any padding of ours.
        norm_epsilon: epsilon of every RMSNorm.
        hidden_act: Hugging Face's name of the gate's activation.
        rope_theta: base of the rotary embedding.
        rope_scaling: the config's rope scaling with its `rope_type`, None for plain rotary embeddings.
        max_position_embeddings: tokens the model was configured for.
        attention_window: tokens that some layer attends to at most, itself included; None where all layers
            attend to everything before.
        tie_word_embeddings: the head is the embedding matrix.
        qkv_bias: the query, key and value projections have a bias.
        output_bias: the attention's output projection has a bias.
        mlp_bias: all three projections of the MLP have a bias.
        qk_norm: queries and keys are normalised per head.
        attention_dropout: probability, 0 for every published family.
        initializer_range: standard deviation of the initial weights.
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    hidden_act: str
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    max_position_embeddings: int
    attention_window: int | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_dropout: float
    initializer_range: float

    @property
    def query_rows(self) -> int:
        """Output rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_rows(self) -> int:
        """Output rows of the key projection, equal to those of the value projection."""
        return self.num_query_groups * self.head_dim
