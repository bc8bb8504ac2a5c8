"""Bytes that a micro batch leaves behind in a layer for its backward pass, and how many micro batches are between the two at once.

After "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, section 4), for a gated MLP, grouped queries and
flash attention, which it does not treat: docs/planner.md derives the terms.

Letters: T tokens of a micro batch on the ranks of one tensor-parallel group (S * B / CP); h hidden, f feed-forward, q query rows, k key
rows; t tensor-parallel ranks, p those that share the tokens between linear layers (t under sequence parallelism, else 1); c bytes of a
number, g bytes of what a linear layer keeps of its input (1 in FP8, 0 where its weight is frozen: nothing needs the input then).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asft_nemo.config.schema import RunConfig
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.adapters import adapter_bytes
from asft_nemo.planner.local_attention import LocalAttention
from asft_nemo.planner.precision import ByteWidths
from asft_nemo.planner.stages import Chunk
from asft_nemo.planner.tokens import Tokens

_STATISTIC = (
    4  # bytes: an inverse root mean square of a norm, a log-sum-exp of attention; fp32 whatever the precision
)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps of one micro batch.

    Attributes:
        input: its input, all that full recomputation keeps.
        attention: from the first norm to the residual.
        core: the part of `attention` that recomputing the attention's products saves.
        mlp: from the second norm on, its input included.
        mlp_inside: the part of `mlp` that recomputing the feed-forward layer saves.
        working: what backward holds for a moment beyond all this: gradients of the widest place, and the gathered input of its linear layer;
            or those of scores that are kept, less what is gone by then.
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
    c, g, hidden = widths.compute, _linear_input(run, widths), spec.hidden_size
    ffn = spec.ffn_hidden_size // tp_size
    norm = tokens.shared * (hidden * _norm(run, widths) + _STATISTIC)
    local = LocalAttention.of(run, spec, widths) if widths.kernels == "local" else None
    attention, core = (
        (local.kept, local.core) if local is not None else _flash_attention(run, spec, tokens, widths)
    )
    if not widths.fused:  # cosines and sines of every position, for queries and for keys
        attention += 4 * spec.head_dim * c * tokens.whole // run.trainer.micro_batch_size
    # gate and up projection [2f], and their product [f], the second linear layer's input; Megatron's unfused SwiGLU keeps silu(gate) and
    # the up projection plus its offset of 0, too
    inside = tokens.whole * ffn * ((2 if widths.fused else 4) * c + g)
    for target, kept in adapter_bytes(run, spec, widths).items():
        if target in ("linear_fc1", "linear_fc2"):
            inside += kept
        else:
            attention += kept
    mlp = norm + inside
    return LayerActivations(
        input=tokens.shared * hidden * c,
        attention=norm + attention,
        core=core,
        mlp=mlp,
        mlp_inside=inside + norm - _before_mlp(run, tokens.shared * hidden, norm, widths),
        # the feed-forward layer is behind when attention's turn comes
        working=max(tokens.whole * c * (3 * ffn + hidden), 0 if local is None else local.backward - mlp),
    )


def _linear_input(run: RunConfig, widths: ByteWidths) -> int:
    """g."""
    return widths.linear_input if run.peft.name == "none" else 0


def _norm(run: RunConfig, widths: ByteWidths) -> int:
    """Bytes that a norm and the linear layer behind it keep of a number: the norm's input, and its output, the linear layer's input."""
    if widths.kernels == "te":
        return widths.compute + _linear_input(run, widths)
    # `asft_nemo.cpu.norm.RMSNorm`: the input in fp32; for its weight's gradient the normed input, in the compute dtype; its output
    return 4 + (2 * widths.compute if run.peft.name == "none" else 0)


def _before_mlp(run: RunConfig, numbers: int, norm: int, widths: ByteWidths) -> int:
    """Of a recomputed feed-forward layer: what is kept ahead of it, its input included.

    Transformer Engine's first linear layer has the norm inside: the layer's input is all. Else the norm is ahead of it and keeps its own, and
    its output is there too: trained, for the norm's weight as well; frozen, for the recomputation alone.
    """
    if widths.kernels == "te":
        return numbers * widths.compute
    return norm + (numbers * widths.compute if run.peft.name != "none" else 0)


def _flash_attention(run: RunConfig, spec: ModelSpec, tokens: Tokens, widths: ByteWidths) -> tuple[int, int]:
    """Bytes between the attention's two linear layers, the second one's input included; and what recomputing the products saves.

    Flash attention keeps queries, keys, values, its output and a statistic a head. The output is also the input of the projection, which keeps
    an FP8 copy of it where it computes in FP8.
    """
    c, whole, tp_size, frozen = widths.compute, tokens.whole, run.parallel.tp_size, run.peft.name != "none"
    queries, keys = spec.query_rows // tp_size, spec.key_value_rows // tp_size
    statistics = whole * spec.num_attention_heads // tp_size * _STATISTIC
    output = queries * (c + (widths.linear_input if widths.linear_input < c and not frozen else 0))
    return whole * ((queries + 2 * keys) * c + output) + statistics, statistics


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
    stages = len(kept)
    ahead = pp_size - rank - 1 if stages == 1 else 2 * (pp_size - rank - 1) + (stages - 1) * pp_size
    # From then on the chunks that come and go repeat themselves, after as many passes as bring pp_size micro batches through all of them.
    total = min(micro_batches * stages, ahead + pp_size * stages + 1)
    alive = most = 0
    for step in range(total):
        alive += kept[_chunk_of(step, stages, pp_size)]
        most = max(most, alive)
        if step >= ahead:
            alive -= kept[stages - 1 - _chunk_of(step - ahead, stages, pp_size)]
    return most


def _chunk_of(step: int, stages: int, pp_size: int) -> int:
    return step // pp_size % stages
