"""Exact numbers of parameters per layer, stage and rank, as Megatron builds them: padded vocabulary, replicated norms, adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from asft_nemo.config.schema import PeftConfig
from asft_nemo.model import padded_vocab_size
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.stages import Chunk


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank by what becomes of them.

    Attributes:
        linear: weights of the layers' linear layers, the only ones that FP8 reaches.
        other: norms and biases.
        embedding: rows of the token embedding.
        head: rows of the head; in a tied model those of the embedding that the last stage looks at: its own copy at several pipeline
            ranks, 0 at one.
        adapters: LoRA's matrices.
    """

    linear: int = 0
    other: int = 0
    embedding: int = 0
    head: int = 0
    adapters: int = 0

    def __add__(self, more: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(self.parts, more.parts, strict=True)))

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """The fields in their order."""
        return self.linear, self.other, self.embedding, self.head, self.adapters

    @property
    def total(self) -> int:
        """Everything that the rank holds."""
        return sum(self.parts)


def layer_parameters(spec: ModelSpec, peft: PeftConfig, tp_size: int) -> Parameters:
    """One transformer layer on one tensor-parallel rank."""
    hidden, rows = spec.hidden_size, linear_rows(spec)
    linear = sum(inputs * outputs for inputs, outputs in rows.values()) // tp_size
    qkv_bias = rows["linear_qkv"][1] // tp_size if spec.qkv_bias else 0
    other = 2 * hidden + qkv_bias + (2 * spec.head_dim if spec.qk_norm else 0)
    adapters = 0
    if peft.name == "lora":
        # Both matrices of every adapter are divided: A [rank, in], B [out, rank] (NeMo's ParallelLinearAdapter).
        adapters = sum(peft.rank * sum(rows[target]) for target in peft.targets) // tp_size
    return Parameters(linear=linear, other=other, adapters=adapters)


def linear_rows(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linear layers, all tensor-parallel ranks together."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    return {
        "linear_qkv": (hidden, spec.query_rows + 2 * spec.key_value_rows),
        "linear_proj": (spec.query_rows, hidden),
        "linear_fc1": (hidden, 2 * ffn),  # gate and up projection in one
        "linear_fc2": (ffn, hidden),
    }


def vocabulary_parameters(spec: ModelSpec, tp_size: int) -> int:
    """The rows of the embedding, or of the head, of one tensor-parallel rank: the padded vocabulary's."""
    return padded_vocab_size(spec.vocab_size, tp_size=tp_size) // tp_size * spec.hidden_size


def rank_parameters(
    spec: ModelSpec, peft: PeftConfig, chunks: Iterable[Chunk], *, tp_size: int
) -> Parameters:
    """All chunks of one pipeline rank, on one tensor-parallel rank."""
    chunks = tuple(chunks)
    layer, layers = layer_parameters(spec, peft, tp_size), sum(chunk.layers for chunk in chunks)
    vocabulary = vocabulary_parameters(spec, tp_size)
    embedding, head = any(chunk.embedding for chunk in chunks), any(chunk.head for chunk in chunks)
    shared = spec.tie_word_embeddings and embedding and head
    beside = Parameters(
        other=spec.hidden_size if head else 0,
        embedding=vocabulary if embedding else 0,
        head=vocabulary if head and not shared else 0,
    )
    return Parameters(*(layers * part for part in layer.parts)) + beside


def rank_tensors(
    spec: ModelSpec, peft: PeftConfig, chunks: Iterable[Chunk], *, tp_size: int
) -> list[tuple[int, int]]:
    """The trained tensors of one pipeline rank, on one tensor-parallel rank: (numbers, how many there are of them)."""
    chunks = tuple(chunks)
    layers, rows = sum(chunk.layers for chunk in chunks), linear_rows(spec)
    if peft.name == "lora":
        ends = [end for target in peft.targets for end in rows[target]]
        return [(peft.rank * end // tp_size, layers) for end in ends]
    hidden = spec.hidden_size
    of_layer = [inputs * outputs // tp_size for inputs, outputs in rows.values()] + [hidden, hidden]
    of_layer += [rows["linear_qkv"][1] // tp_size] if spec.qkv_bias else []
    of_layer += [spec.head_dim, spec.head_dim] if spec.qk_norm else []
    embedding, head = any(chunk.embedding for chunk in chunks), any(chunk.head for chunk in chunks)
    vocabularies = embedding + head - (spec.tie_word_embeddings and embedding and head)
    beside = [(vocabulary_parameters(spec, tp_size), int(vocabularies)), (hidden, int(head))]
    return [*((numbers, layers) for numbers in of_layer), *beside]
