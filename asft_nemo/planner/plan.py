"""The whole plan of a run: memory of every stage, seconds, what the reference costs in each form, whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from asft_nemo.config.schema import RunConfig, data_parallel_size, num_microbatches, replace
from asft_nemo.model import parameter_count
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.gpus import Gpu
from asft_nemo.planner.memory import StageMemory, anchored, memory_of, reads_reference
from asft_nemo.planner.precision import ByteWidths, widths_of
from asft_nemo.planner.published import source_of_sizes
from asft_nemo.planner.stages import pipeline_chunks
from asft_nemo.planner.time import StepTime, step_of, time_of

#: CUDA's context, NCCL's buffers and cuBLAS's workspaces, which torch's counters do not see: an estimate, 2-4 GiB in practice.
OUTSIDE_TORCH = 3 * 2**30
#: Share of what torch allocates that its caching allocator loses between blocks: an estimate, smaller with expandable segments.
FRAGMENTS = 0.05

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "buffers",
    "reference_hidden",
    "activations",
    "recomputed",
    "working",
    "prepass",
)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        run, spec, gpu: what was planned.
        memory: of every pipeline stage.
        step: seconds.
    """

    run: RunConfig
    spec: ModelSpec
    gpu: Gpu
    memory: tuple[StageMemory, ...]
    step: StepTime

    @property
    def compute_bytes(self) -> int:
        """Of one activation."""
        return widths_of(self.run).compute

    @property
    def fullest(self) -> StageMemory:
        """The stage that decides whether the run fits."""
        return max(self.memory, key=lambda stage: stage.peak)

    @property
    def needed(self) -> int:
        """Bytes of a GPU that the fullest stage takes, all told."""
        return int(self.fullest.peak * (1 + FRAGMENTS)) + OUTSIDE_TORCH

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.needed <= self.gpu.memory


def plan_of(run: RunConfig, spec: ModelSpec, gpu: Gpu, *, widths: ByteWidths | None = None) -> Plan:
    """Plans a run whose settings the rules let pass.

    Args:
        run: settings.
        spec: architecture.
        gpu: every rank's.
        widths: bytes of numbers; None for those of the run's precision.
    """
    chosen = widths_of(run) if widths is None else widths
    memory = memory_of(run, spec, chosen)
    stages = time_of(run, spec, chosen, gpu, pipeline_chunks(run.parallel, spec.num_layers))
    return Plan(run, spec, gpu, memory, step_of(run, spec, gpu, stages, memory))


def reference_forms(plan: Plan) -> dict[str, Plan]:
    """The same run with its reference in every form it could have; empty where nothing reads one."""
    run = plan.run
    if not anchored(run) or not reads_reference(run):
        return {}
    forms = ["resident", "offloaded", "cached"] + (["adapter_disabled"] if run.peft.name == "lora" else [])
    return {form: changed(plan, {"reference.form": form}) for form in forms}


def without_reference(plan: Plan) -> Plan:
    """The same run with plain supervised fine-tuning, which reads no reference."""
    return changed(plan, {"objective.name": "sft", "reference.form": "none"})


def changed(plan: Plan, settings: dict[str, Any]) -> Plan:
    """The same run with some settings changed."""
    return plan_of(replace(plan.run, settings), plan.spec, plan.gpu)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for `asft plan --json`: bytes, seconds, counts."""
    step = plan.step
    sft = without_reference(plan).step.seconds
    return {
        "recipe": plan.run.recipe,
        "sizes_of": source_of_sizes(plan.run),
        "objective": plan.run.objective.name,
        "gpu": plan.gpu.name,
        "gpu_bytes": plan.gpu.memory,
        "gpus": step.gpus,
        "parameters": parameter_count(plan.spec),
        "layout": dataclasses.asdict(plan.run.parallel)
        | {"dp_size": data_parallel_size(plan.run), "micro_batches": num_microbatches(plan.run)},
        "fits": plan.fits,
        "needed_bytes": plan.needed,
        "outside_torch_bytes": OUTSIDE_TORCH,
        "fullest_stage": plan.fullest.rank,
        "stages": [_stage_json(plan, rank) for rank in range(len(plan.memory))],
        "step": {
            "seconds": step.seconds,
            "training_seconds": step.training,
            "bubble_seconds": step.bubble,
            "reference_seconds": step.reference,
            "update_seconds": step.update,
            "tokens": step.tokens,
            "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
            "mfu": step.mfu,
            "model_flops": step.model_flops,
            "reference_flops": step.reference_flops,
        },
        "reference_forms": {
            form: {
                "peak_bytes": other.fullest.peak,
                "seconds": other.step.seconds,
                "extra_seconds": other.step.seconds - sft,
                "fits": other.fits,
            }
            for form, other in reference_forms(plan).items()
        },
    }


def _stage_json(plan: Plan, rank: int) -> dict[str, Any]:
    memory, time = plan.memory[rank], plan.step.stages[rank]
    return {
        "rank": rank,
        "layers": memory.layers,
        "parameters": memory.parameters.total,
        "trained_parameters": memory.parameters.total
        if plan.run.peft.name == "none"
        else memory.parameters.adapters,
        "bytes": {part: getattr(memory, part) for part in PARTS} | {"peak": memory.peak},
        "host_bytes": {"optimizer": memory.optimizer_host, "reference": memory.reference_host},
        "chunks_in_flight": memory.in_flight,
        "micro_batch_seconds": {"forward": time.forward, "backward": time.backward, "head": time.head},
    }
