"""A plan as text: a table of the fullest stage by part, a line for every stage, and what would fit."""

from __future__ import annotations

import math

from asft_nemo.config.cluster_rules import spread_tensor_groups
from asft_nemo.config.schema import RunConfig, data_parallel_size, num_microbatches
from asft_nemo.model import parameter_count
from asft_nemo.planner import totals
from asft_nemo.planner.balance import explain
from asft_nemo.planner.cures import cures, largest_part
from asft_nemo.planner.memory import StageMemory
from asft_nemo.planner.plan import FRAGMENTS, Plan, reference_forms, without_reference
from asft_nemo.planner.published import source_of_sizes

GIB = 2**30
_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients, fp32"),
    ("optimizer", "optimizer"),
    ("reference", "reference's weights"),
    ("buffers", "Megatron's shared buffers"),
    ("reference_hidden", "reference's hidden states of a step"),
    ("activations", "activations"),
    ("recomputed", "activations of the layers computed again"),
    ("working", "the widest layer's backward, or the loss"),
    ("prepass", "more during the reference's pass"),
)


def in_words(plan: Plan) -> str:
    """Everything, for a person."""
    parts = (
        [_title(plan)],
        _fullest(plan),
        _stages(plan),
        _step(plan),
        _forms(plan),
        totals.in_words(plan),
        explain(plan),
        slow_groups(plan.run),
        [verdict(plan)],
    )
    return "\n\n".join("\n".join(part) for part in parts if part)


def _title(plan: Plan) -> str:
    run, layout = plan.run, plan.run.parallel
    sizes = [f"TP{layout.tp_size}", f"PP{layout.pp_size}"]
    sizes += [f"VPP{layout.vpp_size}"] if layout.vpp_size else []
    sizes += [f"CP{layout.cp_size}"] if layout.cp_size > 1 else []
    sizes += [f"DP{data_parallel_size(run)}"]
    recompute = run.recompute.granularity
    return (
        f"{run.recipe}, {run.objective.name}, {parameter_count(plan.spec):,} parameters, {run.precision}, peft={run.peft.name}, "
        f"reference={run.reference.form}; sizes of {source_of_sizes(run)}\n{run.run.world_size} x {plan.gpu.name}: {' '.join(sizes)}, "
        f"sequence_parallel={str(layout.sequence_parallel).lower()}, recompute={recompute}; {num_microbatches(run)} micro batches of "
        f"{run.trainer.micro_batch_size} x {run.data.sequence_length:,} tokens a step"
    )


def _fullest(plan: Plan) -> list[str]:
    stage = plan.fullest
    lines = [f"GiB on each GPU of the fullest pipeline stage, {stage.rank}:"]
    lines += [_row(text, getattr(stage, part)) for part, text in _ROWS if getattr(stage, part)]
    host = stage.optimizer_host + stage.reference_host
    in_host = [_row("in host memory, for each GPU", host)] if host else []
    together = "largest of what is there at a time" if stage.prepass else "together"
    return [
        *lines,
        _row(together, stage.peak),
        _row(f"between blocks ({100 * FRAGMENTS:.0f} %) and outside torch", plan.needed - stage.peak),
        _row(f"needed, of {plan.gpu.memory / GIB:.1f}", plan.needed),
        *in_host,
    ]


def _row(text: str, size: int) -> str:
    shown = f"{size / GIB:.2f}" if size >= GIB / 200 else "< 0.01"
    return f"  {text:<46}{shown:>8}"


def _stages(plan: Plan) -> list[str]:
    lines = ["stage  layers     parameters  GiB: lasting  activations   peak   ms a micro batch"]
    for memory, time in zip(plan.memory, plan.step.stages, strict=True):
        head = f" (head and loss {1e3 * time.head:.1f})" if time.head else ""
        lines.append(
            f"{memory.rank:>5}  {memory.layers:>6}  {memory.parameters.total:>13,}  {memory.lasting / GIB:>12.2f}  "
            f"{memory.activations / GIB:>11.2f}  {memory.peak / GIB:>5.2f}   {1e3 * time.total:.1f}{head}"
        )
    return lines


def _step(plan: Plan) -> list[str]:
    step = plan.step
    return [
        f"a step: {step.seconds:.2f} s = training {step.training:.2f} + pipeline bubble {step.bubble:.2f} + reference {step.reference:.2f} "
        f"+ update {step.update:.2f}",
        f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU (padding included), MFU {100 * step.mfu:.1f} % of "
        f"{step.peak / 1e12:,.0f} TFLOP/s, without the reference's operations",
    ]


def _forms(plan: Plan) -> list[str]:
    forms = reference_forms(plan)
    if not forms:
        return []
    plain = without_reference(plan)
    lines = [
        f"reference         peak GiB   s a step   against sft ({plain.fullest.peak / GIB:.2f} GiB, {plain.step.seconds:.2f} s)"
    ]
    for form, other in forms.items():
        more = 100 * (other.step.seconds / plain.step.seconds - 1)
        extra = (other.fullest.peak - plain.fullest.peak) / GIB
        fits = "" if other.fits else ", does not fit"
        lines.append(
            f"{form:<16}  {other.fullest.peak / GIB:>8.2f}   {other.step.seconds:>8.2f}   {extra:+.2f} GiB, {more:+.1f} % time{fits}"
        )
    return lines


def slow_groups(run: RunConfig) -> list[str]:
    """A sentence where tensor-parallel ranks exchange over the network; none where they share a node."""
    if not spread_tensor_groups(run):
        return []
    tp_size, a_node = run.parallel.tp_size, run.cluster.gpus_per_node
    return [
        f"tensor-parallel groups of parallel.tp_size={tp_size} ranks reach beyond nodes of cluster.gpus_per_node={a_node}: what they "
        f"exchange in every layer goes over the network, which is slow; parallel.tp_size={math.gcd(tp_size, a_node)} stays inside"
    ]


def verdict(plan: Plan, *, gpu_word: str = "--gpu ") -> str:
    """Whether it fits; if not, what is too large and what would fit, a GPU being named as `gpu_word` says."""
    stage: StageMemory = plan.fullest
    if plan.fits:
        return f"fits: {(plan.gpu.memory - plan.needed) / GIB:.1f} GiB of {plan.gpu.memory / GIB:.1f} are left on stage {stage.rank}"
    part, size = largest_part(plan)
    found = cures(plan, gpu_word=gpu_word)
    fitting = "; ".join(found) if found else "nothing that was tried: take more GPUs, or a smaller model"
    return (
        f"does not fit: stage {stage.rank} needs {plan.needed / GIB:.1f} of {plan.gpu.memory / GIB:.1f} GiB, the largest part is {part} with "
        f"{size / GIB:.1f} GiB; what would fit: {fitting}"
    )
