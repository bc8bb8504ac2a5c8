"""Every layout of a run's GPUs: those that fit, fastest first, and why the others were passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asft_nemo.config import rules
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import ConfigError
from asft_nemo.planner.cures import largest_part
from asft_nemo.planner.gpus import GPUS_A_NODE
from asft_nemo.planner.plan import Plan, plan_of
from asft_nemo.planner.time import shape_of


@dataclass(frozen=True)
class Found:
    """One layout.

    Attributes:
        settings: what differs from the run that was asked for, as on the command line.
        plan: None where a rule refuses the layout.
        refused: why it is passed over; None where it fits.
        largest: the largest part of what does not fit.
    """

    settings: str
    plan: Plan | None
    refused: str | None
    largest: str | None = None


def search(plan: Plan) -> tuple[Found, ...]:
    """All layouts of the run's GPUs with its other settings: fitting ones by their seconds, then the rejected.

    Tensor parallelism stays within a node, because its exchanges are not hidden; virtual stages are the finest that divide the layers, or
    none; everything is tried with and without full recomputation.
    """
    found = [_try(plan, settings) for settings in _layouts(plan)]
    fitting = [one for one in found if one.refused is None]
    fitting.sort(key=lambda one: one.plan.step.seconds if one.plan else 0.0)
    return (*fitting, *(one for one in found if one.refused is not None))


def _layouts(plan: Plan) -> Iterator[dict[str, Any]]:
    world, layers = plan.run.run.world_size, plan.spec.num_layers
    for tp_size in _powers(min(GPUS_A_NODE, world)):
        for cp_size in _powers(world // tp_size):
            for pp_size in _divisors(world // (tp_size * cp_size)):
                if world % (tp_size * cp_size * pp_size):
                    continue
                for vpp_size in _virtual(layers, pp_size):
                    for granularity in ("none", "full"):
                        yield {
                            "parallel.tp_size": tp_size,
                            "parallel.cp_size": cp_size,
                            "parallel.pp_size": pp_size,
                            "parallel.vpp_size": vpp_size,
                            "parallel.sequence_parallel": tp_size > 1,
                            "parallel.first_stage_layers": None,
                            "parallel.last_stage_layers": None,
                            "recompute.granularity": granularity,
                            "run.world_size": world,
                        }


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _virtual(layers: int, pp_size: int) -> list[int | None]:
    """No virtual stages, and those of 4 layers, 2 and 1."""
    if pp_size < 2 or layers % pp_size:
        return [None]
    share = layers // pp_size
    return [None, *sorted({share // size for size in (4, 2, 1) if share % size == 0 and share // size > 1})]


def _try(plan: Plan, settings: dict[str, Any]) -> Found:
    words = _words(settings)
    run: RunConfig = replace(plan.run, settings)
    try:
        rules.check(run, shape=shape_of(plan.spec))
    except ConfigError as error:
        return Found(words, None, error.violations[0])
    tried = plan_of(run, plan.spec, plan.gpu)
    if tried.fits:
        return Found(words, tried, None)
    part, size = largest_part(tried)
    return Found(
        words, tried, f"needs {tried.needed / 2**30:.1f} GiB, {part} {size / 2**30:.1f} of them", part
    )


def _words(settings: dict[str, Any]) -> str:
    short = {
        "tp": settings["parallel.tp_size"],
        "pp": settings["parallel.pp_size"],
        "vpp": settings["parallel.vpp_size"],
        "cp": settings["parallel.cp_size"],
    }
    given = [f"parallel.{name}_size={size}" for name, size in short.items() if size is not None]
    return " ".join([*given, f"recompute.granularity={settings['recompute.granularity']}"])


def in_words(found: tuple[Found, ...], *, most: int) -> str:
    """The fastest layouts, and the reasons against the rest with how many layouts each holds for."""
    fitting = [one for one in found if one.plan is not None and one.refused is None]
    lines = [f"{len(fitting)} of {len(found)} layouts fit; tokens/s/GPU, GiB a GPU:"]
    for one in fitting[:most]:
        assert one.plan is not None
        speed = one.plan.step.tokens_per_second_per_gpu
        lines.append(f"{speed:>8,.0f}  {one.plan.needed / 2**30:>6.1f}  {one.settings}")
    lines += _rejected([one for one in found if one.refused is not None])
    return "\n".join(lines)


def _rejected(found: list[Found]) -> list[str]:
    """Every reason once: how many layouts it holds for, and of those that need too much the one that needs least."""
    reasons: dict[str, list[Found]] = {}
    for one in found:
        reasons.setdefault(f"largest is {one.largest}" if one.largest else str(one.refused), []).append(one)
    lines = ["rejected:"] if reasons else []
    for reason, layouts in reasons.items():
        nearest = min(layouts, key=lambda one: one.plan.needed if one.plan else 0)
        if nearest.plan is None:
            lines.append(f"{len(layouts):>4} as {nearest.settings}: {reason}")
        else:
            lines.append(
                f"{len(layouts):>4} need too much, {reason}; the least is {nearest.settings}, which {nearest.refused}"
            )
    return lines


def as_json(found: tuple[Found, ...]) -> list[dict[str, Any]]:
    """Plain values."""
    return [
        {
            "settings": one.settings,
            "fits": one.refused is None,
            "refused": one.refused,
            "needed_bytes": None if one.plan is None else one.plan.needed,
            "seconds": None if one.plan is None else one.plan.step.seconds,
            "tokens_per_second_per_gpu": None
            if one.plan is None
            else one.plan.step.tokens_per_second_per_gpu,
        }
        for one in found
    ]
