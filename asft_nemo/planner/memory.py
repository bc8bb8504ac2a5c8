"""Bytes on a GPU, part by part, for every pipeline stage: formulas and their sources in docs/planner.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asft_nemo.config import tables
from asft_nemo.config.schema import RunConfig, data_parallel_size, num_microbatches
from asft_nemo.model import padded_vocab_size
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.activations import (
    chunk_bytes,
    layer_activations,
    most_in_flight,
    recomputed_bytes,
)
from asft_nemo.planner.host import optimizer_host_bytes
from asft_nemo.planner.local_attention import shared_buffer_bytes
from asft_nemo.planner.parameters import Parameters, rank_parameters
from asft_nemo.planner.precision import ByteWidths, reference_widths
from asft_nemo.planner.stages import Chunk, pipeline_chunks
from asft_nemo.planner.tokens import Tokens

#: What "auto" allows the loss's [chunk, vocabulary] buffers on a GPU (`asft_nemo.losses.chunks`, which imports torch; a test compares).
CHUNK_BYTES = 512 * 2**20
LEAST_CHUNK_TOKENS = 512
_ANGLE = 4  # bytes: fp32, `RotaryEmbedding` (megatron-core 0.15.3)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        rank: pipeline rank.
        layers: transformer layers.
        parameters: on each GPU.
        weights, gradients, optimizer: of the policy, adapters included.
        reference: weights of the frozen reference, or of psft's snapshot, that stay.
        reference_hidden: hidden states of the reference, of all micro batches of a step.
        activations: of micro batches between forward and backward.
        recomputed: of a layer, or a group of them, that is being computed again.
        working: what the widest layer's backward pass, or the loss, holds for a moment.
        buffers: what Megatron makes at the first micro batch and keeps: tables of rotary embeddings; for its own attention a buffer of scores
            and the mask.
        prepass: what the reference's pass adds for its time, before activations grow.
        in_flight: micro batches' chunks that are alive at once, at most.
        optimizer_host, reference_host: bytes in host memory for each GPU: under `optim.cpu_offload` masters, moments and gradients of a
            share of the parameters, with what pinned memory loses; an offloaded reference but its head, whose pinned memory loses nothing.
    """

    rank: int
    layers: int
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    reference: int
    reference_hidden: int
    activations: int
    recomputed: int
    working: int
    buffers: int
    prepass: int
    in_flight: int
    optimizer_host: int
    reference_host: int

    @property
    def lasting(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.buffers

    @property
    def peak(self) -> int:
        """The most at a time: in the reference's pass, or in training."""
        training = self.activations + self.recomputed + self.working
        return self.lasting + self.reference_hidden + max(training, self.prepass)


def memory_of(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> tuple[StageMemory, ...]:
    """Every pipeline stage.

    Args:
        run: settings whose layout fits the model.
        spec: architecture.
        widths: bytes of numbers in the policy.
    """
    chunks = pipeline_chunks(run.parallel, spec.num_layers)
    return tuple(_stage(run, spec, widths, rank, chunks[rank]) for rank in range(len(chunks)))


def _stage(
    run: RunConfig, spec: ModelSpec, widths: ByteWidths, rank: int, chunks: Sequence[Chunk]
) -> StageMemory:
    parameters = rank_parameters(spec, run.peft, chunks, tp_size=run.parallel.tp_size)
    trained = parameters.total if run.peft.name == "none" else parameters.adapters
    shards = (
        data_parallel_size(run) * run.parallel.cp_size if run.optim.distributed else 1
    )  # context-parallel ranks have the same weights, and Megatron shards over both
    moved = round(
        trained * run.optim.cpu_offload
    )  # Megatron moves whole tensors until it has at least so many
    layer, head = layer_activations(run, spec, widths), any(chunk.head for chunk in chunks)
    micro_batches = num_microbatches(run)
    kept = [chunk_bytes(run, spec, layer, chunk, widths) for chunk in chunks]
    held, pass_bytes, host = _reference(run, spec, parameters, chunks)
    hidden = hidden_state_bytes(run, spec, widths) * micro_batches if head else 0
    flight = {"pp_size": run.parallel.pp_size, "rank": rank, "micro_batches": micro_batches}
    return StageMemory(
        rank=rank,
        layers=sum(chunk.layers for chunk in chunks),
        parameters=parameters,
        weights=weight_bytes(parameters, chunks, widths),
        gradients=trained * widths.gradient,
        optimizer=-(-(trained - moved) * widths.optimizer // shards),
        reference=held,
        reference_hidden=hidden if keeps_hidden(run) else 0,
        activations=most_in_flight(kept, **flight),
        recomputed=recomputed_bytes(run, layer, chunks),
        working=max(layer.working, loss_bytes(run, spec, widths) if head else 0),
        buffers=_buffers(run, spec, widths, chunks),
        prepass=pass_bytes + (hidden if reads_reference(run) and not keeps_hidden(run) else 0),
        in_flight=most_in_flight([1] * len(chunks), **flight),
        optimizer_host=optimizer_host_bytes(
            run, spec, chunks, moved=moved, state=widths.optimizer, shards=shards
        ),
        reference_host=host,
    )


def weight_bytes(parameters: Parameters, chunks: Sequence[Chunk], widths: ByteWidths) -> int:
    """Weights of a rank: linear layers in their own width, the first and the last layers of an FP8 model in the compute dtype."""
    layers = sum(chunk.layers for chunk in chunks)
    edges = widths.edge_layers * (any(c.embedding for c in chunks) + any(c.head for c in chunks))
    in_compute = parameters.linear * min(edges, layers) // layers if layers else 0
    narrow = parameters.linear - in_compute
    return narrow * widths.linear_weight + (parameters.total - narrow) * widths.compute


def _buffers(run: RunConfig, spec: ModelSpec, widths: ByteWidths, chunks: Sequence[Chunk]) -> int:
    """Megatron's shared buffers: a table of fp32 angles for each chunk of each model, and those of attention that keeps its scores."""
    tables_of_rank = len(chunks) * (2 if has_second_model(run) else 1)
    angles = run.data.sequence_length // run.parallel.cp_size * spec.head_dim * _ANGLE * tables_of_rank
    return angles + (shared_buffer_bytes(run, spec, widths) if widths.kernels == "local" else 0)


def reads_reference(run: RunConfig) -> bool:
    """Whether a frozen model runs ahead of every step."""
    known = tables.OBJECTIVES[run.objective.name]
    return anchored(run) or known.reads_ref_labels or known.reads_old_labels


def anchored(run: RunConfig) -> bool:
    """Whether the loss has a divergence to the reference."""
    return tables.OBJECTIVES[run.objective.name].has_divergence and run.objective.kl_weight != 0


def keeps_hidden(run: RunConfig) -> bool:
    """Whether hidden states of all micro batches wait for the loss; else each becomes one number a token before training starts."""
    return anchored(run)


def hidden_state_bytes(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> int:
    """One micro batch's final hidden states on one rank of the last stage."""
    return Tokens.of(run).shared * spec.hidden_size * widths.compute


def _reference(
    run: RunConfig, spec: ModelSpec, parameters: Parameters, chunks: Sequence[Chunk]
) -> tuple[int, int, int]:
    """Bytes of frozen weights that stay, that come for the prepass alone, and that wait in host memory."""
    if not reads_reference(run):
        return 0, 0, 0
    widths = reference_widths(run)
    base = Parameters(*parameters.parts[:-1])
    whole = weight_bytes(base, chunks, widths)
    head = 0
    if any(chunk.head for chunk in chunks):
        head = vocabulary_rows(run, spec) * spec.hidden_size * widths.compute
    form = _form(run)
    held = {"resident": whole, "offloaded": head, "cached": head, "adapter_disabled": 0}[form]
    if form != "offloaded":
        return held, 0, 0
    # copies in FP8 that are made of wider weights, for the pass, are made again each time
    stored = replace(widths, linear_weight=min(widths.linear_weight, widths.compute))
    return held, whole - head, weight_bytes(base, chunks, stored) - head


def _form(run: RunConfig) -> str:
    """Where the frozen weights are, told by the name of a reference form."""
    if tables.OBJECTIVES[run.objective.name].reads_old_labels:
        return "resident"  # psft's snapshot of the policy
    if run.reference.form == "cached" and run.reference.fill == "first_epoch":
        return "resident"  # the model that fills it is on the device until the epoch ends
    return run.reference.form


def has_second_model(run: RunConfig) -> bool:
    """Whether a frozen model of its own runs beside the policy."""
    return reads_reference(run) and _form(run) in ("resident", "offloaded")


def vocabulary_rows(run: RunConfig, spec: ModelSpec) -> int:
    """This rank's rows of the vocabulary, padding included."""
    tp_size = run.parallel.tp_size
    return padded_vocab_size(spec.vocab_size, tp_size=tp_size) // tp_size


def loss_bytes(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> int:
    """What the loss holds for one micro batch on the last stage, every token of which counts."""
    tokens, rows, models = Tokens.of(run), vocabulary_rows(run, spec), 1 + anchored(run)
    # logits of both models and their difference in fp32, and the logit gradient in bf16 for the products with it
    a_token = rows * (4 * (3 if anchored(run) else 1) + 2)
    if run.loss.implementation == "fused":
        chunk = run.loss.chunk_tokens
        chunks = -(-tokens.whole // (_auto_chunk(a_token) if chunk == "auto" else int(chunk)))
        buffers = -(-tokens.whole // chunks) * a_token
        gathered = models * widths.compute if run.parallel.sequence_parallel else 0
        # the hidden states' gradient in fp32, and hidden states of all tokens where ranks hold a part of them
        return buffers + tokens.whole * spec.hidden_size * (4 + gathered)
    # Megatron's logits of both models and their gradient, a chunk of fp32 copies beside them; dense: of the whole vocabulary
    factor = run.parallel.tp_size if run.loss.implementation == "dense" else 1
    return (
        tokens.whole * rows * factor * (widths.compute * (models + 1) + (12 if factor > 1 else 0))
        + CHUNK_BYTES
    )


def _auto_chunk(a_token: int) -> int:
    """Tokens that `loss.chunk_tokens=auto` takes at most, by the bytes of one: asft_nemo/losses/chunks.py, which needs torch."""
    return max(CHUNK_BYTES // a_token, min(LEAST_CHUNK_TOKENS, 2 * CHUNK_BYTES // a_token), 1)
