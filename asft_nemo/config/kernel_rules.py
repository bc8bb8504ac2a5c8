"""Rules about switches that only change speed or memory: what they need, and where Megatron would ignore them without a word."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.config import machine
from asft_nemo.config.facts import Facts, Rule
from asft_nemo.config.fp8 import asked_of

RECOMPUTED_MODULES = ("core_attn", "mlp")


def _overlaps(facts: Facts) -> Iterator[str]:
    optim = facts.run.optim
    if optim.overlap_param_gather and not (optim.distributed and optim.overlap_grad_reduce):
        yield (
            "optim.overlap_param_gather=true needs the distributed optimizer, whose parameters it gathers, and overlapped reductions: "
            "set optim.distributed=true and optim.overlap_grad_reduce=true, or optim.overlap_param_gather=false"
        )


def _offloaded_state(facts: Facts) -> Iterator[str]:
    optim, precision = facts.run.optim, facts.run.precision
    if not optim.cpu_offload:
        return
    if not optim.distributed:
        yield (
            f"optim.cpu_offload={optim.cpu_offload:g} moves the distributed optimizer's state, and this run has an ordinary one: set "
            "optim.distributed=true"
        )
    if precision != "bf16":
        # Megatron's hybrid optimizer finds no masters of fp32 parameters when it reads a checkpoint, and none of FP8 ones at all
        yield f"optim.cpu_offload={optim.cpu_offload:g} works with bf16 parameters, and this run has precision={precision}: set precision=bf16"


def _recomputed_modules(facts: Facts) -> Iterator[str]:
    modules = facts.run.recompute.modules
    unknown = [name for name in modules if name not in RECOMPUTED_MODULES]
    if unknown or not modules or len(set(modules)) < len(modules):
        yield (
            f"recompute.modules=[{', '.join(modules)}] does not name parts of a layer, each once: choose from "
            f"{', '.join(RECOMPUTED_MODULES)}"
        )


def _tensor_overlap(facts: Facts) -> Iterator[str]:
    """Megatron and NeMo switch the overlap off with a warning where its needs are not met; its buffers have one size."""
    run, layout = facts.run, facts.run.parallel
    if not layout.tp_comm_overlap:
        return
    if layout.tp_size < 2 or not layout.sequence_parallel:
        yield (
            "parallel.tp_comm_overlap=true overlaps the gathers and scatters of sequence parallelism, and this run has none: set "
            "parallel.tp_size=2 or more with parallel.sequence_parallel=true, or leave it out"
        )
    if run.precision == "fp32":
        yield "parallel.tp_comm_overlap=true exchanges bf16 or FP8, and precision=fp32 has neither: set precision=bf16, or leave it out"
    if run.data.group_by_length:
        yield (
            "parallel.tp_comm_overlap=true exchanges through buffers of one size, and data.group_by_length=true makes micro batches of "
            "several: leave one of them out"
        )
    size = run.reference.micro_batch_size
    if size is not None and size != run.trainer.micro_batch_size and run.reference.form != "none":
        yield (
            f"parallel.tp_comm_overlap=true exchanges through buffers of the policy's size, and reference.micro_batch_size={size} differs "
            f"from trainer.micro_batch_size={run.trainer.micro_batch_size}: leave reference.micro_batch_size out"
        )


def _tensor_overlap_here(facts: Facts) -> Iterator[str]:
    there = machine.gpu_count() > 0 and machine.part("transformer_engine").there()
    if facts.run.parallel.tp_comm_overlap and not there:
        yield (
            "parallel.tp_comm_overlap=true needs a GPU and Transformer Engine, whose GEMMs it is part of, and they are not both here: "
            "leave it out, or run where both are (docs/container.md)"
        )


def _local_layers(facts: Facts) -> Iterator[str]:
    """What is part of Transformer Engine's layers alone. Megatron's own would compute in bf16 and exchange without overlap, and say nothing."""
    if facts.run.kernels.layers != "local":
        return
    theirs = [asked for asked, _ in asked_of(facts.run)]
    if facts.run.parallel.tp_comm_overlap:
        theirs.append("parallel.tp_comm_overlap=true")
    for asked in theirs:
        yield f"{asked} is part of Transformer Engine's layers, and kernels.layers=local leaves them out: leave one of the two out"


def _fusion_here(facts: Facts) -> Iterator[str]:
    asked = facts.run.kernels.gradient_accumulation_fusion
    if asked and not (machine.gpu_count() > 0 and machine.has_fused_weight_gradient()):
        yield (
            f"kernels.gradient_accumulation_fusion=true needs a GPU and apex's {machine.FUSED_WEIGHT_GRADIENT}, and they are not both here: "
            "leave it out (it is used where it can be), or run where both are (docs/container.md)"
        )


KERNELS: tuple[Rule, ...] = (_overlaps, _offloaded_state, _recomputed_modules, _tensor_overlap, _local_layers)
KERNELS_HERE: tuple[Rule, ...] = (_tensor_overlap_here, _fusion_here)
