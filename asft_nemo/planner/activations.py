"""Bytes that a micro batch leaves behind in a layer for its backward pass, and how many micro batches are between the two at once.

After "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, section 4), for a gated MLP, grouped queries and
flash attention, which it does not treat: docs/planner.md derives the terms.

Letters: T tokens of a micro batch on the ranks of one tensor-parallel group (S * B / CP); h hidden, f feed-forward, q query rows, k key
rows; t tensor-parallel ranks, p those that share the tokens between linear layers (t under sequence parallelism, else 1); c bytes of a
number, g bytes of what a linear layer keeps of its input (1 in FP8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asft_nemo.config.schema import RunConfig
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.precision import ByteWidths
from asft_nemo.planner.stages import Chunk

_STATISTIC = (
    4  # bytes: an inverse root mean square of a norm, a log-sum-exp of attention; fp32 whatever the precision
)


@dataclass(frozen=True)
class Tokens:
    """A micro batch on one rank.

    Attributes:
        whole: T, tokens of the rank's tensor-parallel group.
        shared: the rank's own between linear layers: T / t under sequence parallelism, else T.
        keys: tokens that attention looks at in a row, for attention that keeps its scores.
    """

    whole: int
    shared: int
    keys: int

    @classmethod
    def of(cls, run: RunConfig) -> Tokens:
        """Those of the policy's micro batches."""
        layout, length = run.parallel, run.data.sequence_length
        whole = length * run.trainer.micro_batch_size // layout.cp_size
        return cls(whole, whole // (layout.tp_size if layout.sequence_parallel else 1), length)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps of one micro batch.

    Attributes:
        input: its input, all that full recomputation keeps.
        attention: from the first norm to the residual.
        core: the part of `attention` that recomputing the attention's products saves.
        mlp: from the second norm on, its input included.
        mlp_inside: the part of `mlp` that recomputing the feed-forward layer saves.
        working: what backward holds for a moment beyond all this: gradients of the widest place, and the gathered input of its linear layer.
    """

    input: int
    attention: int
    core: int
    mlp: int
    mlp_inside: int
    working: int

    @property
    def kept(self) -> int:
        """Everything, nothing being computed again."""
        return self.attention + self.mlp

    def kept_with(self, run: RunConfig) -> int:
        """What a layer keeps that is not recomputed as a whole."""
        modules = run.recompute.modules if run.recompute.granularity == "selective" else ()
        saved = self.core * ("core_attn" in modules) + self.mlp_inside * ("mlp" in modules)
        return self.kept - saved


def layer_activations(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> LayerActivations:
    """One layer of the policy.

    Args:
        run: settings.
        spec: architecture.
        widths: bytes of numbers, and which kernels.
    """
    tokens, tp_size = Tokens.of(run), run.parallel.tp_size
    c, g, hidden = widths.compute, widths.linear_input, spec.hidden_size
    queries, keys = spec.query_rows // tp_size, spec.key_value_rows // tp_size
    ffn, heads = spec.ffn_hidden_size // tp_size, spec.num_attention_heads // tp_size
    # T/p * h * c: the input of a norm, and T/p * h * g its output, which is the linear layer's input
    norm = tokens.shared * (hidden * (c + g) + _STATISTIC)
    if widths.kernels == "local":
        norm = tokens.shared * (hidden * _local_norm(c) + _STATISTIC)
    attention, core = _attention(tokens, queries, keys, heads, widths)
    if not widths.fused:  # cosines and sines of every position, for queries and for keys
        attention += 4 * spec.head_dim * c * tokens.whole // run.trainer.micro_batch_size
    # gate and up projection [2f], and their product [f], the second linear layer's input; Megatron's unfused SwiGLU keeps silu(gate) and
    # the up projection plus its offset of 0, too
    inside = tokens.whole * ffn * ((2 if widths.fused else 4) * c + g)
    return LayerActivations(
        input=tokens.shared * hidden * c,
        attention=norm + attention,
        core=core,
        mlp=norm + inside,
        mlp_inside=inside,
        working=tokens.whole * c * (3 * ffn + hidden),
    )


def _local_norm(c: int) -> int:
    """Bytes a number of `asft_nemo.cpu.norm.RMSNorm`: the input in fp32, the normed input and the result in the compute dtype."""
    return 4 + 2 * c


def _attention(tokens: Tokens, queries: int, keys: int, heads: int, widths: ByteWidths) -> tuple[int, int]:
    """Bytes between the attention's two linear layers, the second one's input included; and what recomputing the products saves."""
    c, whole = widths.compute, tokens.whole
    if widths.kernels == "te":
        # Flash attention keeps queries, keys, values, its output and a statistic a head. The output is also the input of the projection,
        # which keeps an FP8 copy of it where it computes in FP8.
        output = queries * c + (queries * widths.linear_input if widths.linear_input < c else 0)
        return whole * ((queries + 2 * keys) * c + output + heads * _STATISTIC), whole * heads * _STATISTIC
    # Megatron's own: rotated queries; keys and values repeated for every query head; probabilities, in fp32 and once more in bf16
    grouped = queries if keys < queries else keys
    probabilities = heads * tokens.keys * (4 + (c if c < 4 else 0))
    kept = whole * (c * (queries + 2 * grouped + queries) + probabilities)
    # Recomputed, it keeps what comes in: rotated queries and keys, and values inside the joint projection that they are a view of
    again = whole * c * (queries + keys + (queries + 2 * keys) + queries)
    return kept, kept - again


def chunk_bytes(
    run: RunConfig, spec: ModelSpec, layer: LayerActivations, chunk: Chunk, widths: ByteWidths
) -> int:
    """What one micro batch leaves behind in a chunk."""
    recompute, layers = run.recompute, chunk.layers
    if recompute.granularity != "full":
        kept = layers * layer.kept_with(run)
    elif recompute.method == "uniform":
        kept = -(-layers // recompute.num_layers) * layer.input
    else:
        again = min(recompute.num_layers, layers)
        kept = again * layer.input + (layers - again) * layer.kept
    if chunk.head:
        # the final norm's input, and the hidden states' gradient, which the loss computes in forward
        kept += 2 * Tokens.of(run).shared * spec.hidden_size * widths.compute
    return kept


def recomputed_bytes(run: RunConfig, layer: LayerActivations, chunks: Sequence[Chunk]) -> int:
    """What is alive of one recomputed group while its backward pass runs."""
    recompute, most = run.recompute, max(chunk.layers for chunk in chunks)
    if recompute.granularity == "full":
        return layer.kept * (
            min(recompute.num_layers, most) if recompute.method == "uniform" else min(1, most)
        )
    return layer.kept - layer.kept_with(run)


def most_in_flight(kept: Sequence[int], *, pp_size: int, rank: int, micro_batches: int) -> int:
    """The most bytes that the micro batches between their forward and backward pass hold on a rank.

    Megatron's schedules (`get_pp_rank_microbatches`, megatron-core 0.15.3): rank r of p starts with p - r - 1 forward passes, then one
    forward and one backward pass take turns; interleaved, with 2 (p - r - 1) + (v - 1) p forward passes of chunks, p micro batches through
    one chunk, then through the next, and backward passes in the opposite order of chunks.

    Args:
        kept: bytes that a micro batch leaves in each of the rank's chunks.
        pp_size: p.
        rank: r.
        micro_batches: of one step.
    """
    stages, total = len(kept), micro_batches * len(kept)
    ahead = pp_size - rank - 1 if stages == 1 else 2 * (pp_size - rank - 1) + (stages - 1) * pp_size
    alive = most = 0
    for step in range(total):
        alive += kept[_chunk_of(step, stages, pp_size)]
        most = max(most, alive)
        if step >= ahead:
            alive -= kept[stages - 1 - _chunk_of(step - ahead, stages, pp_size)]
    return most


def _chunk_of(step: int, stages: int, pp_size: int) -> int:
    return step // pp_size % stages
