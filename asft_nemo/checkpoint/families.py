"""The tensors of every model family, a row each. How to add one: docs/families.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from asft_nemo.checkpoint import decoder
from asft_nemo.checkpoint.mapping import LAYER, TensorMapping
from asft_nemo.model import ModelSpec

HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"

# Modules for which a Megatron model asks for an (empty) `_extra_state` when it loads strictly. The linear
# ones do so with the local and with the Transformer Engine layers, the others with Transformer Engine only, and
# the last two in families that normalise queries and keys. One too many does no harm.
EXTRA_STATE_PER_LAYER = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.layers.self_attention.q_layernorm",
    "decoder.layers.self_attention.k_layernorm",
)
EXTRA_STATE = ("decoder.final_layernorm",)


@dataclass(frozen=True)
class TensorFamily:
    """One row of the table.

    Attributes:
        mappings: from a spec to its tensor mappings.
        ignored: Hugging Face tensors that old checkpoints carry and that the config alone determines.
    """

    mappings: Callable[[ModelSpec], tuple[TensorMapping, ...]]
    ignored: tuple[str, ...] = ()


# In old checkpoints: a buffer that rope_theta determines.
_FREQUENCIES = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)

TENSOR_FAMILIES: dict[str, TensorFamily] = {
    name: TensorFamily(mappings=decoder.mappings, ignored=_FREQUENCIES)
    for name in ("qwen2", "qwen3", "llama", "mistral")
}


def mappings_of(spec: ModelSpec) -> tuple[TensorMapping, ...]:
    """Returns the tensor mappings of a model."""
    return TENSOR_FAMILIES[spec.family].mappings(spec)


def layers_of(mapping: TensorMapping, spec: ModelSpec) -> range:
    """Returns the layer indices of a mapping; just 0 for a tensor that is not per layer."""
    return range(spec.num_layers if mapping.per_layer else 1)


def hf_name(template: str, layer: int) -> str:
    """Returns a Hugging Face tensor's name with its layer filled in."""
    return template.replace(LAYER, str(layer))


@dataclass(frozen=True)
class HfTensor:
    """One tensor that a Hugging Face checkpoint of the model must have.

    Attributes:
        name: its name.
        template: the same with `{layer}`.
        shape: its shape.
        layer: its layer, 0 where there is none.
        mapping: the mapping it belongs to.
    """

    name: str
    template: str
    shape: tuple[int, ...]
    layer: int
    mapping: TensorMapping


def hf_tensors(spec: ModelSpec) -> list[HfTensor]:
    """Returns every tensor of the Hugging Face checkpoint, in the order of the forward pass."""

    def of(mapping: TensorMapping, layer: int) -> Iterator[HfTensor]:
        for template, shape in mapping.hf_shapes().items():
            yield HfTensor(hf_name(template, layer), template, shape, layer, mapping)

    def stays_outside(mapping: TensorMapping) -> bool:
        return not mapping.per_layer

    table = mappings_of(spec)
    before = list(takewhile(stays_outside, table))
    after = [mapping for mapping in table[len(before) :] if not mapping.per_layer]
    tensors = [tensor for mapping in before for tensor in of(mapping, 0)]
    for layer in range(spec.num_layers):
        tensors += [tensor for mapping in table if mapping.per_layer for tensor in of(mapping, layer)]
    return tensors + [tensor for mapping in after for tensor in of(mapping, 0)]


def ignored_hf_names(spec: ModelSpec) -> frozenset[str]:
    """Returns the names of tensors that an import may find and leave out."""
    ignored = TENSOR_FAMILIES[spec.family].ignored
    return frozenset(hf_name(name, layer) for name in ignored for layer in range(spec.num_layers))
