"""The tensors of a decoder whose Hugging Face names are those of LLaMA: every family so far. The spec says which of them there are."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.checkpoint.mapping import Copy, GatedMLP, Heads, InterleavedQKV, TensorMapping, Vocabulary
from asft_nemo.model import ModelSpec

_LAYER = "model.layers.{layer}."
_ATTENTION = "decoder.layers.self_attention."
_MLP = "decoder.layers.mlp."


def mappings(spec: ModelSpec) -> tuple[TensorMapping, ...]:
    """Returns one mapping per Megatron tensor, in the order of the forward pass."""
    head = () if spec.tie_word_embeddings else (_vocabulary(spec, "output_layer.weight", "lm_head.weight"),)
    return (
        _vocabulary(spec, "embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *_attention(spec),
        *_mlp(spec),
        Copy(
            megatron="decoder.final_layernorm.weight",
            hf="model.norm.weight",
            num_rows=spec.hidden_size,
            per_layer=False,
        ),
        *head,
    )


def _vocabulary(spec: ModelSpec, megatron: str, hf: str) -> Vocabulary:
    return Vocabulary(
        megatron=megatron,
        hf=hf,
        num_rows=spec.vocab_size,
        row_shape=(spec.hidden_size,),
        per_layer=False,
    )


def _kinds(spec: ModelSpec, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the kinds of tensors of a projection from the hidden size, with the shape of a row."""
    yield "weight", (spec.hidden_size,)
    if bias:
        yield "bias", ()


def _attention(spec: ModelSpec) -> Iterator[TensorMapping]:
    """Yields one layer's attention with the norm before it."""
    heads: Heads = {
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "head_dim": spec.head_dim,
    }
    yield Copy(
        megatron=_ATTENTION + "linear_qkv.layer_norm_weight",
        hf=_LAYER + "input_layernorm.weight",
        num_rows=spec.hidden_size,
    )
    for kind, row_shape in _kinds(spec, bias=spec.qkv_bias):
        yield InterleavedQKV(
            megatron=_ATTENTION + f"linear_qkv.{kind}",
            query=_LAYER + f"self_attn.q_proj.{kind}",
            key=_LAYER + f"self_attn.k_proj.{kind}",
            value=_LAYER + f"self_attn.v_proj.{kind}",
            row_shape=row_shape,
            **heads,
        )
    if spec.qk_norm:
        for name in ("q", "k"):
            yield Copy(
                megatron=_ATTENTION + f"{name}_layernorm.weight",
                hf=_LAYER + f"self_attn.{name}_norm.weight",
                num_rows=spec.head_dim,
            )
    yield from _row_parallel(
        _ATTENTION + "linear_proj", "self_attn.o_proj", spec, columns=spec.query_rows, bias=spec.output_bias
    )


def _mlp(spec: ModelSpec) -> Iterator[TensorMapping]:
    """Yields one layer's gated MLP with the norm before it."""
    yield Copy(
        megatron=_MLP + "linear_fc1.layer_norm_weight",
        hf=_LAYER + "post_attention_layernorm.weight",
        num_rows=spec.hidden_size,
    )
    for kind, row_shape in _kinds(spec, bias=spec.mlp_bias):
        yield GatedMLP(
            megatron=_MLP + f"linear_fc1.{kind}",
            gate=_LAYER + f"mlp.gate_proj.{kind}",
            up=_LAYER + f"mlp.up_proj.{kind}",
            ffn_hidden_size=spec.ffn_hidden_size,
            row_shape=row_shape,
        )
    yield from _row_parallel(
        _MLP + "linear_fc2", "mlp.down_proj", spec, columns=spec.ffn_hidden_size, bias=spec.mlp_bias
    )


def _row_parallel(
    megatron: str, hf: str, spec: ModelSpec, *, columns: int, bias: bool
) -> Iterator[TensorMapping]:
    """Yields a projection back to the hidden size."""
    yield Copy(
        megatron=f"{megatron}.weight",
        hf=f"{_LAYER}{hf}.weight",
        num_rows=spec.hidden_size,
        row_shape=(columns,),
    )
    if bias:
        yield Copy(megatron=f"{megatron}.bias", hf=f"{_LAYER}{hf}.bias", num_rows=spec.hidden_size)
