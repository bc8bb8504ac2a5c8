"""Qwen2 and Qwen2.5: the tensors, with biases on the query, key and value projections."""

from __future__ import annotations

from asft_nemo.checkpoint.mapping import Copy, GatedMLP, Heads, InterleavedQKV, TensorMapping, Vocabulary
from asft_nemo.model import ModelSpec


def mappings(spec: ModelSpec) -> tuple[TensorMapping, ...]:
    """Returns one mapping per Megatron tensor, in the order of the forward pass."""
    hidden, layer = (spec.hidden_size,), "model.layers.{layer}."
    attention: Heads = {
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "head_dim": spec.head_dim,
    }
    table: tuple[TensorMapping, ...] = (
        Vocabulary(
            megatron="embedding.word_embeddings.weight",
            hf="model.embed_tokens.weight",
            num_rows=spec.vocab_size,
            row_shape=hidden,
            per_layer=False,
        ),
        Copy(
            megatron="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            hf=layer + "input_layernorm.weight",
            num_rows=spec.hidden_size,
        ),
        InterleavedQKV(
            megatron="decoder.layers.self_attention.linear_qkv.weight",
            query=layer + "self_attn.q_proj.weight",
            key=layer + "self_attn.k_proj.weight",
            value=layer + "self_attn.v_proj.weight",
            row_shape=hidden,
            **attention,
        ),
        InterleavedQKV(
            megatron="decoder.layers.self_attention.linear_qkv.bias",
            query=layer + "self_attn.q_proj.bias",
            key=layer + "self_attn.k_proj.bias",
            value=layer + "self_attn.v_proj.bias",
            **attention,
        ),
        Copy(
            megatron="decoder.layers.self_attention.linear_proj.weight",
            hf=layer + "self_attn.o_proj.weight",
            num_rows=spec.hidden_size,
            row_shape=(spec.query_rows,),
        ),
        Copy(
            megatron="decoder.layers.mlp.linear_fc1.layer_norm_weight",
            hf=layer + "post_attention_layernorm.weight",
            num_rows=spec.hidden_size,
        ),
        GatedMLP(
            megatron="decoder.layers.mlp.linear_fc1.weight",
            gate=layer + "mlp.gate_proj.weight",
            up=layer + "mlp.up_proj.weight",
            ffn_hidden_size=spec.ffn_hidden_size,
            row_shape=hidden,
        ),
        Copy(
            megatron="decoder.layers.mlp.linear_fc2.weight",
            hf=layer + "mlp.down_proj.weight",
            num_rows=spec.hidden_size,
            row_shape=(spec.ffn_hidden_size,),
        ),
        Copy(
            megatron="decoder.final_layernorm.weight",
            hf="model.norm.weight",
            num_rows=spec.hidden_size,
            per_layer=False,
        ),
    )
    if not spec.tie_word_embeddings:
        head = Vocabulary(
            megatron="output_layer.weight",
            hf="lm_head.weight",
            num_rows=spec.vocab_size,
            row_shape=hidden,
            per_layer=False,
        )
        table = (*table, head)
    return table
