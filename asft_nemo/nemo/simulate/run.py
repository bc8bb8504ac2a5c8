"""The simulation of a run: its stages one after the other, as figures."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from asft_nemo.config import rules
from asft_nemo.config.schema import RunConfig, num_microbatches, replace
from asft_nemo.cpu import backend
from asft_nemo.losses.triton.dispatch import VARIABLE as TRITON
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.simulate.flight import Flight, step_of
from asft_nemo.nemo.simulate.meter import META, AsOnGpu, WithoutData
from asft_nemo.nemo.simulate.stage import Stage, Traced, build_stage, hidden_states, trace
from asft_nemo.nemo.simulate.stand_ins import rotary_kernel
from asft_nemo.nemo.simulate.world import first_rank_of_stage
from asft_nemo.planner.host import pinned_bytes
from asft_nemo.planner.time import shape_of

_FP32 = 4
_MOMENTS = 2  # of Adam, fp32 beside each fp32 master


@dataclass(frozen=True)
class StageFigures:
    """One rank of a pipeline stage; bytes unless said otherwise.

    Attributes:
        stage, rank: its number, and the rank that was simulated.
        layers: transformer layers, all virtual stages together.
        parameters, trained_parameters: numbers of them.
        weights: of all parameters.
        gradients: Megatron's fp32 sums of the trained ones.
        optimizer: fp32 masters, where these are not the weights themselves, and both moments; this rank's share on the device.
        optimizer_host: under `optim.cpu_offload` masters, moments and gradients in host memory.
        padding: what Megatron adds so that buffers divide over data-parallel ranks.
        reference: the frozen reference on the device during a step.
        reference_host: the part of it that waits in host memory.
        snapshot: psft's copy of the policy.
        reference_hidden: the reference's hidden states of a step's micro batches, which wait on the last stage.
        activations: left behind by one micro batch.
        activations_in_flight: left behind by all micro batches that are between forward and backward, at most.
        passes_in_flight: how many forward passes of virtual stages these are.
        loss: the most that the loss holds while it runs.
        workspace: Megatron's shared buffers and tables, made at the first micro batch.
        peak: the most at a time: everything above and what running passes hold. None where nothing was traced.
    """

    stage: int
    rank: int
    layers: int
    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_host: int
    padding: int
    reference: int
    reference_host: int
    snapshot: int
    reference_hidden: int
    activations: int | None = None
    activations_in_flight: int | None = None
    passes_in_flight: int | None = None
    loss: int | None = None
    workspace: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Simulation:
    """What was simulated, and what came out.

    Attributes:
        kernels: ``te`` (stand-ins for Transformer Engine's layers) or ``local`` (Megatron's own).
        precision: of the run that was built.
        notes: what differs from the run that was asked for, and what passed.
        stages: every pipeline stage; the first, the middle and the last are traced.
    """

    kernels: str
    precision: str
    notes: tuple[str, ...]
    stages: tuple[StageFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def simulate(
    run: RunConfig, spec: ModelSpec, *, kernels: str = "te", trace_stages: bool = True
) -> Simulation:
    """Builds a run stage by stage, and sends a micro batch through the first, the middle and the last.

    Megatron's process groups of this process are made and ended again: nothing else may be using them.

    Args:
        run: the settings; `model.path` need not exist.
        spec: architecture of the base model.
        kernels: ``te`` or ``local``, see `Simulation`.
        trace_stages: whether micro batches are traced; without, a stage takes a second.

    Raises:
        ConfigError: the settings break one of this project's rules.
        LayoutError: Megatron refuses to make a config of them; the message has its words.
    """
    if not backend.active() or os.environ.get(TRITON) != "0":
        raise RuntimeError(f"a simulation needs ASFT_DEVICE=cpu and {TRITON}=0 from the process's start")
    twin, notes = bf16_twin(run)
    rules.check(twin, shape=shape_of(spec))
    pp_size = run.parallel.pp_size
    traced = {0, pp_size // 2, pp_size - 1} if trace_stages else set()
    stages = tuple(_simulated(twin, spec, number, kernels, number in traced) for number in range(pp_size))
    return Simulation(kernels, twin.precision, notes, stages)


def bf16_twin(run: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """The run without FP8, and what to say of it."""
    changes, notes = {}, []
    if run.precision.startswith("fp8"):
        changes["precision"] = "bf16"
        notes.append(
            f"precision={run.precision} is simulated as bf16: FP8 needs Transformer Engine and a GPU"
        )
    if run.reference.precision == "fp8":
        changes["reference.precision"] = "policy"
        notes.append("reference.precision=fp8 is simulated as the policy's")
    return (replace(run, changes) if changes else run), tuple(notes)


def _simulated(run: RunConfig, spec: ModelSpec, number: int, kernels: str, traced: bool) -> StageFigures:
    meter = WithoutData()
    with first_rank_of_stage(run, number) as rank, _without_data(meter):
        stage = build_stage(run, spec, kernels=kernels, meter=meter)
        gc.collect()
        held = _held(stage, number)
        on_device = sum(size for part, size in held.items() if not part.endswith("_host"))
        figures = {**held, **(_traced(stage, on_device) if traced else {})}
        counts = _counts(stage)
        del stage
    gc.collect()
    return StageFigures(stage=number, rank=rank, **counts, **figures)


@contextlib.contextmanager
def _without_data(meter: WithoutData) -> Iterator[None]:
    # What torch would compile runs as it is written: between its operations more is alive than inside one kernel, but no more is kept.
    with torch.compiler.set_stance("force_eager"), rotary_kernel(), meter, META, AsOnGpu():
        yield


def _counts(stage: Stage) -> dict[str, int]:
    parameters = [p for chunk in stage.chunks for p in chunk.parameters()]
    return {
        "layers": sum(len(chunk.decoder.layers) for chunk in stage.chunks),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }


def _held(stage: Stage, number: int) -> dict[str, int]:
    """Bytes between steps and during all of one, by what they are for."""
    parameters = [p for chunk in stage.chunks for p in chunk.parameters()]
    sums = [p.main_grad for p in parameters if p.requires_grad]  # type: ignore[attr-defined]
    buffers = [buffer for chunk in stage.parallel for buffer in chunk.module.buffers]
    weights, gradients = _bytes(parameters), _bytes(sums)
    whole = _storages([*parameters, *sums, *(b.grad_data for b in buffers)])
    optimizer, optimizer_host = _optimizer_bytes(stage, parameters)
    reference, snapshot = stage.copies.get("reference"), stage.copies.get("snapshot")
    on_device, in_host = _reference_bytes(stage, 0 if reference is None else reference.held().device)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "optimizer_host": optimizer_host,
        "padding": whole - weights - gradients,
        "reference": on_device,
        "reference_host": in_host,
        "snapshot": 0 if snapshot is None else snapshot.held().device,
        "reference_hidden": _reference_hidden(stage, number),
    }


def _optimizer_bytes(stage: Stage, parameters: Sequence[Tensor]) -> tuple[int, int]:
    """(on the device, in host memory)."""
    device = host = 0
    for part in stage.optimizers:
        own = [p for group in part.param_groups for p in group["params"]]
        numbers = sum(p.numel() for p in own)
        if isinstance(part.optimizer, HybridDeviceOptimizer):  # its fp32 masters are not those of its groups
            moved = [p.numel() for p in part.optimizer.gpu_params_map_cpu_copy]
            device += (1 + _MOMENTS) * _FP32 * (numbers - sum(moved))
            # and a copy of the gradients, pinned tensor by tensor
            host += (1 + _MOMENTS) * _FP32 * sum(moved) + sum(pinned_bytes(_FP32 * n) for n in moved)
        else:
            device += _storages([*parameters, *own]) - _storages(parameters) + _MOMENTS * _FP32 * numbers
    return device, host


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _storages(tensors: Sequence[Tensor]) -> int:
    """Bytes behind the tensors, what they share counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _reference_bytes(stage: Stage, whole: int) -> tuple[int, int]:
    """(on the device, in host memory) of a second model of `whole` bytes, in this run's form."""
    form = stage.run.reference.form
    filling = form == "cached" and stage.run.reference.fill == "first_epoch"  # from a resident one
    if form == "resident" or filling or not whole:
        return whole, 0
    head = stage.copies["reference"].head()
    stays = 0 if head is None else head.nbytes
    return stays, (whole - stays if form == "offloaded" else 0)


def _reference_hidden(stage: Stage, number: int) -> int:
    """Of all micro batches of a step: the prepass ends before the first of them is trained on."""
    last = number == stage.run.parallel.pp_size - 1
    if not last or stage.config.objective.divergence is None:
        return 0
    return num_microbatches(stage.run) * hidden_states(stage.run, stage.config).nbytes


def _traced(stage: Stage, held: int) -> dict[str, int]:
    """One micro batch through every virtual stage; those that are alike are traced once."""
    seen: dict[tuple[bool, bool, int], Traced] = {}
    traces, workspace = [], 0
    for index, chunk in enumerate(stage.chunks):
        kind = chunk.pre_process, chunk.post_process, len(chunk.decoder.layers)
        if kind not in seen:
            seen[kind] = trace(stage, index)
            workspace += seen[kind].persistent
        traces.append(seen[kind])
    flight: Flight = step_of(
        [traced.bytes for traced in traces],
        micro_batches=num_microbatches(stage.run),
        pp_size=stage.run.parallel.pp_size,
    )
    return {
        "activations": sum(traced.bytes.kept for traced in traces),
        "activations_in_flight": flight.kept,
        "passes_in_flight": flight.passes,
        "loss": max(traced.loss for traced in traces),
        "workspace": workspace,
        "peak": held + workspace + flight.peak,
    }
