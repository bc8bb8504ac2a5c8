"""Every layout of a run's GPUs: those that fit, fastest first, and why the others were passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

from asft_nemo.config import rules
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import ConfigError
from asft_nemo.planner.cures import largest_part
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
        own: it is the run's own.
    """

    settings: str
    plan: Plan | None
    refused: str | None
    largest: str | None = None
    own: bool = False


def search(plan: Plan) -> tuple[Found, ...]:
    """All layouts of the run's GPUs with its other settings: fitting ones by their seconds, then the rejected.

    Tensor parallelism stays within a node, because its exchanges are not hidden; virtual stages have 4 layers, 2 or 1, or there are none;
    everything is tried with and without full recomputation. The run's own layout is among them, whatever it is.
    """
    layouts = list(_layouts(plan))
    own = {key: _of(plan.run, key) for key in layouts[0]}
    if own not in layouts:
        layouts.append(own)
    found = [replace_fields(_try(plan, settings), own=settings == own) for settings in layouts]
    fitting = [one for one in found if one.refused is None]
    fitting.sort(key=lambda one: one.plan.step.seconds if one.plan else 0.0)
    return (*fitting, *(one for one in found if one.refused is not None))


def _layouts(plan: Plan) -> Iterator[dict[str, Any]]:
    world, layers = plan.run.run.world_size, plan.spec.num_layers
    for tp_size in _powers(min(plan.run.cluster.gpus_per_node, world)):
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
                            "parallel.account_for_embedding": False,
                            "parallel.account_for_loss": False,
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
    words = _words(plan.run, settings)
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


_ALWAYS = ("parallel.tp_size", "parallel.pp_size", "parallel.cp_size", "recompute.granularity")


def _of(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(run, section), name)


def _words(run: RunConfig, settings: dict[str, Any]) -> str:
    """The layout, and whatever else of it the run has otherwise."""
    shown = {key: value for key, value in settings.items() if key in _ALWAYS or value != _of(run, key)}
    if settings["parallel.vpp_size"] is not None:
        shown["parallel.vpp_size"] = settings["parallel.vpp_size"]
    given = [f"{key}={_plain(shown[key])}" for key in settings if key in shown]
    return " ".join(given)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def in_words(found: tuple[Found, ...], *, most: int) -> str:
    """The fastest layouts, and the reasons against the rest with how many layouts each holds for."""
    fitting = [one for one in found if one.plan is not None and one.refused is None]
    lines = [f"{len(fitting)} of {len(found)} layouts fit; tokens/s/GPU, GiB a GPU:"]
    for place, one in enumerate(fitting, start=1):
        if place > most and not one.own:
            continue
        assert one.plan is not None
        speed, own = (
            one.plan.step.tokens_per_second_per_gpu,
            f"  <- this run, number {place}" if one.own else "",
        )
        lines.append(f"{speed:>8,.0f}  {one.plan.needed / 2**30:>6.1f}  {one.settings}{own}")
    lines += [f"this run, {one.settings}: {one.refused}" for one in found if one.own and one.refused]
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
            "own": one.own,
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
