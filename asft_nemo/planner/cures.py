"""What would make a run fit that does not: changes of one setting or a few, each tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asft_nemo.config import rules
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import ConfigError, UserError
from asft_nemo.planner.gpus import GPUS, Gpu
from asft_nemo.planner.memory import reads_reference
from asft_nemo.planner.plan import Plan, changed, plan_of
from asft_nemo.planner.time import shape_of

_TIMES = (2, 4, 8)  # as many GPUs
_NAMES = {
    "weights": "the weights",
    "gradients": "the gradients",
    "optimizer": "the optimizer's state",
    "reference": "the reference's weights",
    "buffers": "Megatron's shared buffers",
    "reference_hidden": "the reference's hidden states of a step",
    "activations": "the activations",
    "recomputed": "the layers computed again",
    "working": "one layer's backward pass or the loss",
    "prepass": "the reference's pass",
}


def largest_part(plan: Plan) -> tuple[str, int]:
    """The largest part of the fullest stage, in words, and its bytes."""
    sizes = {text: getattr(plan.fullest, part) for part, text in _NAMES.items()}
    name = max(sizes, key=lambda text: sizes[text])
    return name, sizes[name]


def cures(plan: Plan, *, gpu_word: str = "--gpu ") -> list[str]:
    """Changes that fit, as words for the command line, what changes least first.

    Args:
        plan: what does not fit.
        gpu_word: how the command line names another GPU.
    """
    tried = (
        next((settings for settings in group if fits_with(plan, settings)), None) for group in _changes(plan)
    )
    found = [_words(settings) for settings in tried if settings is not None]
    larger = [gpu for gpu in GPUS.values() if gpu.memory > plan.gpu.memory]
    return found + [f"{gpu_word}{gpu.name}" for gpu in larger if _fits_on(plan, gpu)]


def _fits_on(plan: Plan, other: Gpu) -> bool:
    try:
        return plan_of(plan.run, plan.spec, other).fits
    except UserError:  # it does not compute in the run's precision
        return False


def fits_with(plan: Plan, settings: dict[str, Any]) -> bool:
    """Whether the changed run keeps every rule and fits."""
    try:
        rules.check(replace(plan.run, settings), shape=shape_of(plan.spec))
    except ConfigError:
        return False
    return changed(plan, settings).fits


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in settings.items())


def _plain(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()


def _changes(plan: Plan) -> Iterator[list[dict[str, Any]]]:
    """Groups of changes; of each group the first that fits is told."""
    run, layout = plan.run, plan.run.parallel
    if reads_reference(run) and run.reference.form == "resident":
        yield [{"reference.form": "offloaded"}]
        yield [{"reference.form": "cached"}]
    if not run.optim.distributed:
        yield [{"optim.distributed": True}]
    if run.recompute.granularity == "none":
        yield [{"recompute.granularity": "selective", "recompute.modules": ("mlp",)}]
    if run.recompute.granularity != "full":
        yield [{"recompute.granularity": "full"}]
    if layout.tp_size > 1 and not layout.sequence_parallel:
        yield [{"parallel.sequence_parallel": True}]
    yield from _more_gpus(run)
    if run.peft.name == "none":
        yield [
            {"peft.name": "lora"} | ({"reference.form": "adapter_disabled"} if reads_reference(run) else {})
        ]


def _more_gpus(run: RunConfig) -> Iterator[list[dict[str, Any]]]:
    """Two, four and eight times as many, for one kind of parallelism each; tensor parallelism within a node."""
    layout, world = run.parallel, run.run.world_size
    for key, size in (("cp_size", layout.cp_size), ("tp_size", layout.tp_size), ("pp_size", layout.pp_size)):
        more = [times for times in _TIMES if key != "tp_size" or times * size <= run.cluster.gpus_per_node]
        shared = {"parallel.sequence_parallel": True} if key == "tp_size" else {}
        yield [{f"parallel.{key}": times * size, "run.world_size": times * world} | shared for times in more]
    yield [{"run.world_size": times * world} for times in _TIMES]
