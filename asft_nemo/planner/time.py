"""Seconds of a step: operations over what a GPU does of them, bytes over what it moves, and the pipeline's idle time.

What is left out: exchanges between pipeline stages, which run beside computing; loading data; kernels too small to fill a GPU.
docs/planner.md compares with published speeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from asft_nemo.config.cluster_rules import spread_tensor_groups
from asft_nemo.config.fp8 import FP8
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig, data_parallel_size, num_microbatches
from asft_nemo.errors import UserError
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.activations import layer_activations
from asft_nemo.planner.flops import Flops, adapter_flops, causal_pairs, forward_flops, training_flops
from asft_nemo.planner.gpus import Gpu
from asft_nemo.planner.memory import StageMemory, anchored, reads_reference, vocabulary_rows
from asft_nemo.planner.precision import ByteWidths
from asft_nemo.planner.stages import Chunk
from asft_nemo.planner.tokens import Tokens

# Shares of the peak. FP8: between what the two published runs of docs/planner.md come to (0.44, 0.49), casts included. bf16: what large
# products reach on these GPUs, smaller ones less; no published run of this stack was compared.
LINEAR_EFFICIENCY = {"bf16": 0.65, "fp8": 0.47}
# Flash attention with heads of 128 channels reaches about half of the bf16 peak, forward and backward (arXiv 2307.08691, figures 4-6).
ATTENTION_EFFICIENCY = 0.5
# Its backward pass computes the scores again: five products, forward has two.
ATTENTION_BACKWARD = 2.5
# Between the products, a layer's activations are written once and read again: by the next kernel, by backward, and their gradients likewise.
ACTIVATION_PASSES = 6
BANDWIDTH_EFFICIENCY = 0.8
# Keys and values go around a context-parallel ring beside attention's products; in backward their gradients go with them.
RING_BACKWARD = 2
# Gathers and scatters of sequence parallelism in a layer: two and two in forward, as many in backward, and for full fine-tuning the two
# inputs once more for their weights' gradients.
FORWARD_EXCHANGES, BACKWARD_EXCHANGES, GRADIENT_EXCHANGES = 4, 4, 2
# The optimizer reads and writes its state and gradients and writes the weights: bytes moved for a byte of state.
OPTIMIZER_PASSES = 3


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro batch on one pipeline rank.

    Attributes:
        rank: pipeline rank.
        layers: its transformer layers.
        layer: seconds of one layer, forward and backward.
        forward: of the rank's layers.
        backward: of the rank's layers, recomputation included.
        head: of the head and the loss, both models'.
        reference_head: the part of `head` that the reference's product is.
        reference: of the reference's own pass through the rank.
    """

    rank: int
    layers: int
    layer: float
    forward: float
    backward: float
    head: float
    reference_head: float
    reference: float

    @property
    def total(self) -> float:
        """Training alone."""
        return self.forward + self.backward + self.head


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what they come to.

    Attributes:
        stages: of one micro batch.
        training, bubble, reference, update: parts of a step: the slowest stage's micro batches; waiting for the pipeline to fill and
            drain; the reference's pass ahead of the training; gradients, parameters and optimizer.
        model_flops: of the policy and the reference, all GPUs, one step.
        reference_flops: the reference's part.
        tokens: of one step, padding included.
        gpus: of the run.
        peak: of one GPU in the run's precision, operations a second.
    """

    stages: tuple[StageTime, ...]
    training: float
    bubble: float
    reference: float
    update: float
    model_flops: float
    reference_flops: float
    tokens: int
    gpus: int
    peak: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.training + self.bubble + self.reference + self.update

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Padding included."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Share of the peak that the policy's own operations make of; the reference's are not counted."""
        return (self.model_flops - self.reference_flops) / self.seconds / self.gpus / self.peak


def shape_of(spec: ModelSpec) -> ModelShape:
    """The sizes that operations are counted from."""
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        ffn_hidden_size=spec.ffn_hidden_size,
        vocab_size=spec.vocab_size,
        max_positions=spec.max_position_embeddings,
        attention_window=spec.attention_window,
        head_dim=spec.head_dim,
    )


def time_of(
    run: RunConfig, spec: ModelSpec, widths: ByteWidths, gpu: Gpu, chunks: Sequence[Sequence[Chunk]]
) -> tuple[StageTime, ...]:
    """One micro batch on every pipeline rank; see `StageTime`."""
    layer = _layer_seconds(run, spec, widths, gpu)
    head, reference_head = _head_seconds(run, spec, gpu)
    return tuple(
        _stage(run, rank, chunks[rank], layer, (head, reference_head)) for rank in range(len(chunks))
    )


def step_of(
    run: RunConfig, spec: ModelSpec, gpu: Gpu, stages: tuple[StageTime, ...], memory: Sequence[StageMemory]
) -> StepTime:
    """A whole step from its micro batches."""
    micro_batches, gpus = num_microbatches(run), run.run.world_size
    fill = (run.parallel.pp_size - 1) / (run.parallel.vpp_size or 1)
    slowest = max(stage.total for stage in stages)
    reference = max(stage.reference for stage in stages)
    model, frozen = _flops(run, spec)
    rows = run.trainer.global_batch_size
    return StepTime(
        stages=stages,
        training=micro_batches * slowest,
        bubble=fill * sum(stage.total for stage in stages) / len(stages),
        reference=(micro_batches + fill) * reference,
        update=max(_update(run, gpu, stage) for stage in memory),
        model_flops=rows * (model + frozen),
        reference_flops=rows * frozen,
        tokens=rows * run.data.sequence_length,
        gpus=gpus,
        peak=1e12 * _peak(run.precision, gpu),
    )


@dataclass(frozen=True)
class _LayerSeconds:
    forward: float
    backward: float
    again: float  # what recomputing the whole layer takes
    selective: float
    reference: float


def _peak(precision: str, gpu: Gpu) -> float:
    """10^12 operations a second.

    Raises:
        UserError: the GPU computes nothing in FP8.
    """
    if precision in FP8 and gpu.peak.fp8 is None:
        key = FP8[precision].key
        raise UserError(
            f"{key}={precision} needs a GPU that computes in FP8, and {gpu.name} does not: set {key}={FP8[precision].instead}, or give "
            "another --gpu"
        )
    of_format = {"fp32": gpu.fp32, "bf16": gpu.peak.bf16}
    return of_format.get(precision) or gpu.peak.fp8 or gpu.peak.bf16


def _linear_rate(precision: str, gpu: Gpu) -> float:
    """Operations a second of a linear layer."""
    return 1e12 * _peak(precision, gpu) * LINEAR_EFFICIENCY["fp8" if precision in FP8 else "bf16"]


def _forward(run: RunConfig, spec: ModelSpec) -> Flops:
    """Of one micro batch through one layer and the head, on one GPU; a row counts as one sequence, packed or not."""
    shape, layout = dataclasses.replace(shape_of(spec), num_layers=1), run.parallel
    length, rows, ranks = (
        run.data.sequence_length,
        run.trainer.micro_batch_size,
        layout.tp_size * layout.cp_size,
    )
    whole = forward_flops(shape, tokens=length * rows, attended=causal_pairs([length] * rows))
    return Flops(whole.layers / ranks, whole.attention / ranks, whole.head / ranks)


def _layer_seconds(run: RunConfig, spec: ModelSpec, widths: ByteWidths, gpu: Gpu) -> _LayerSeconds:
    flops, full = _forward(run, spec), run.peft.name == "none"
    linear = flops.layers / _linear_rate(run.precision, gpu)
    attention_peak = gpu.fp32 if run.precision == "fp32" else gpu.peak.bf16
    attention = flops.attention / (1e12 * attention_peak * ATTENTION_EFFICIENCY)
    ring = _ring_seconds(run, spec, widths, gpu)
    attending, attending_back = (
        max(attention, ring),
        max(attention * ATTENTION_BACKWARD, ring * RING_BACKWARD),
    )
    kept = layer_activations(run, spec, widths)
    traffic = kept.kept * ACTIVATION_PASSES / (gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY)
    exchange = _exchange_seconds(run, spec, widths, gpu)
    forward = linear + attending + traffic / 3 + exchange * FORWARD_EXCHANGES
    backward = (
        linear * (2 if full else 1)
        + attending_back
        + traffic * 2 / 3
        + exchange * (BACKWARD_EXCHANGES + (GRADIENT_EXCHANGES if full else 0))
    )
    frozen = run.precision if run.reference.precision == "policy" else run.reference.precision
    reference = forward - linear + flops.layers / _linear_rate(frozen, gpu)
    modules = run.recompute.modules if run.recompute.granularity == "selective" else ()
    selective = attending * ("core_attn" in modules) + _mlp_share(spec) * linear * ("mlp" in modules)
    return _LayerSeconds(forward, backward, forward, selective, reference)


def _mlp_share(spec: ModelSpec) -> float:
    """The feed-forward layer's share of a layer's weights."""
    mlp = 3 * spec.hidden_size * spec.ffn_hidden_size
    return mlp / (mlp + 2 * spec.hidden_size * (spec.query_rows + spec.key_value_rows))


def _exchange_seconds(run: RunConfig, spec: ModelSpec, widths: ByteWidths, gpu: Gpu) -> float:
    """One gather or scatter over the tensor-parallel group; nothing where it hides in the products."""
    layout = run.parallel
    if layout.tp_size == 1 or layout.tp_comm_overlap:
        return 0.0
    moved = Tokens.of(run).whole * spec.hidden_size * widths.compute * (layout.tp_size - 1) / layout.tp_size
    bandwidth = gpu.network_bandwidth if spread_tensor_groups(run) else gpu.node_bandwidth
    return moved / (bandwidth * BANDWIDTH_EFFICIENCY)


def _ring_seconds(run: RunConfig, spec: ModelSpec, widths: ByteWidths, gpu: Gpu) -> float:
    """Keys and values of a rank's tokens on their way past all other ranks of its context-parallel ring, in one forward pass of a layer."""
    layout = run.parallel
    rows = 2 * spec.key_value_rows // layout.tp_size
    moved = (layout.cp_size - 1) * Tokens.of(run).whole * rows * widths.compute
    inside = layout.tp_size * layout.cp_size <= run.cluster.gpus_per_node
    bandwidth = gpu.node_bandwidth if inside else gpu.network_bandwidth
    return moved / (bandwidth * BANDWIDTH_EFFICIENCY)


def _head_seconds(run: RunConfig, spec: ModelSpec, gpu: Gpu) -> tuple[float, float]:
    """The head and the loss of a micro batch in which every token counts, and the reference's product in it; always in bf16."""
    tokens, rows = Tokens.of(run).whole, vocabulary_rows(run, spec)
    product = 2.0 * tokens * rows * spec.hidden_size / (1e12 * gpu.peak.bf16 * LINEAR_EFFICIENCY["bf16"])
    own = 3 if run.peft.name == "none" else 2
    # logits are written, read for their statistics and for their gradient, in fp32, and that is read by both products, in bf16
    traffic = tokens * rows * (4 * 3 + 2 * 3) / (gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY)
    theirs = (
        product + tokens * rows * 4 * 2 / (gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY)
        if anchored(run)
        else 0.0
    )
    return own * product + traffic + theirs, theirs


def _stage(
    run: RunConfig, rank: int, chunks: Sequence[Chunk], layer: _LayerSeconds, head: tuple[float, float]
) -> StageTime:
    layers, has_head = sum(chunk.layers for chunk in chunks), any(chunk.head for chunk in chunks)
    recompute, again = run.recompute, 0.0
    if recompute.granularity == "full":
        whole = recompute.method == "uniform"
        again = layer.again * sum(c.layers if whole else min(recompute.num_layers, c.layers) for c in chunks)
    passes = reads_reference(run) and not (run.reference.form == "cached" and run.reference.fill == "job")
    return StageTime(
        rank=rank,
        layers=layers,
        layer=layer.forward + layer.backward + layer.selective + (again / layers if layers else 0.0),
        forward=layers * layer.forward,
        backward=layers * (layer.backward + layer.selective) + again,
        head=head[0] if has_head else 0.0,
        reference_head=head[1] if has_head else 0.0,
        reference=layers * layer.reference if passes else 0.0,
    )


def _update(run: RunConfig, gpu: Gpu, memory: StageMemory) -> float:
    """Reducing gradients, gathering parameters and the optimizer's own pass; exchanges that overlap cost nothing."""
    ranks = data_parallel_size(run) * run.parallel.cp_size
    one_node = run.run.world_size <= run.cluster.gpus_per_node
    bandwidth = (gpu.node_bandwidth if one_node else gpu.network_bandwidth) * BANDWIDTH_EFFICIENCY
    share = (ranks - 1) / ranks
    trained = memory.gradients // 4
    reduce = 0.0 if run.optim.overlap_grad_reduce else memory.gradients * share / bandwidth
    if not run.optim.distributed:
        reduce *= 2  # an all-reduce is a reduce-scatter and an all-gather
    gather = (
        2 * trained * share / bandwidth
        if run.optim.distributed and not run.optim.overlap_param_gather
        else 0.0
    )
    state = (memory.optimizer + memory.gradients) * OPTIMIZER_PASSES
    return reduce + gather + state / (gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY)


def _flops(run: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """Operations of one row: the policy's forward and backward, and the reference's."""
    shape, length = shape_of(spec), run.data.sequence_length
    forward = forward_flops(shape, tokens=length, attended=causal_pairs([length]))
    adapters = None
    if run.peft.name == "lora":
        adapters = adapter_flops(shape, tokens=length, rank=run.peft.rank, targets=run.peft.targets)
    frozen = 0.0
    if reads_reference(run):
        frozen = forward.head if run.reference.form == "cached" else forward.total
    return training_flops(forward, adapters=adapters), frozen
