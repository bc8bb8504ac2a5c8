"""Rules about pipeline stages and what is computed again on them, rows of the table of `asft_nemo.config.rules`."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.config.facts import Facts, Rule
from asft_nemo.config.schema import ParallelConfig


def _virtual_stages(facts: Facts) -> Iterator[str]:
    layout = facts.run.parallel
    if layout.vpp_size is not None and layout.pp_size < 2:
        yield (
            f"parallel.vpp_size={layout.vpp_size} needs pipeline stages, got pp_size=1: "
            "set parallel.vpp_size=null or parallel.pp_size=2"
        )


def _one_way(facts: Facts) -> Iterator[str]:
    layout = facts.run.parallel
    given = [name for name in _OWN if getattr(layout, name) is not None]
    counted = [name for name in _COUNTED if getattr(layout, name)]
    if layout.pp_size < 2:
        for name in (*given, *counted):
            yield f"parallel.{name} does nothing at pp_size=1: leave it out, or set parallel.pp_size=2"
    elif given and counted:
        yield (
            f"parallel.{given[0]} and parallel.{counted[0]} are two ways to share out the layers, and Megatron takes one: leave one of them out"
        )


def _layers(facts: Facts) -> Iterator[str]:
    shape, layout = facts.shape, facts.run.parallel
    if shape is None or layout.pp_size < 1 or (layout.vpp_size or 1) < 1:
        return
    given = [value for value in (layout.first_stage_layers, layout.last_stage_layers) if value is not None]
    if layout.pp_size > 1 and given:
        yield from _own_shares(layout, shape.num_layers, given)
    else:
        yield from _equal_shares(layout, shape.num_layers)


def _equal_shares(layout: ParallelConfig, num_layers: int) -> Iterator[str]:
    """All stages alike, the embedding and the loss counted as layers where asked."""
    stages = layout.pp_size * (layout.vpp_size or 1)
    counted = [name for name in _COUNTED if getattr(layout, name)] if layout.pp_size > 1 else []
    total = num_layers + len(counted)
    virtual = f" x vpp_size={layout.vpp_size}" if layout.vpp_size else ""
    with_counted = f" and {' and '.join(_COUNTED[name] for name in counted)}" if counted else ""
    if total % stages:
        fitting = ", ".join(str(size) for size in range(1, total + 1) if total % size == 0)
        cure = "" if counted else "; or set parallel.last_stage_layers"
        yield (
            f"parallel.pp_size={layout.pp_size}{virtual} does not divide the model's {num_layers} "
            f"layers{with_counted}: choose them so that their product is one of {fitting}{cure if layout.pp_size > 1 else ''}"
        )
    elif counted and total == stages:
        yield (
            f"parallel.{counted[0]}=true leaves a stage without a layer at pp_size={layout.pp_size}{virtual}: lower parallel.pp_size or "
            "parallel.vpp_size"
        )


def _own_shares(layout: ParallelConfig, num_layers: int, given: list[int]) -> Iterator[str]:
    """The first or the last stage has its own number of layers."""
    others, rest, virtual = layout.pp_size - len(given), num_layers - sum(given), layout.vpp_size or 1
    names = " and ".join(
        f"parallel.{name}={getattr(layout, name)}" for name in _OWN if getattr(layout, name) is not None
    )
    if others == 0:
        yield f"{names} name every stage, and each follows from the other: leave parallel.last_stage_layers out"
    elif rest < others or rest % others:
        yield f"{names} leaves {rest} of the model's {num_layers} layers to {others} other stages, which does not divide: correct it"
    elif any(share % virtual for share in (*given, rest // others)):
        shares = " and ".join(str(share) for share in (*given, rest // others))
        yield f"{names} gives stages of {shares} layers, not all multiples of parallel.vpp_size={virtual}: correct it"


def _recomputed_layers(facts: Facts) -> Iterator[str]:
    run, shape = facts.run, facts.shape
    if shape is None or run.recompute.granularity != "full" or run.parallel.pp_size < 1:
        return
    most = -(-shape.num_layers // (run.parallel.pp_size * (run.parallel.vpp_size or 1)))
    if run.recompute.num_layers > max(
        most, run.parallel.first_stage_layers or 0, run.parallel.last_stage_layers or 0
    ):
        yield (
            f"recompute.num_layers={run.recompute.num_layers} is more than the {most} layers of a pipeline stage: set it to that or less"
        )


_OWN = ("first_stage_layers", "last_stage_layers")
_COUNTED = {"account_for_embedding": "the embedding", "account_for_loss": "the loss"}
PIPELINE: tuple[Rule, ...] = (_virtual_stages, _one_way, _layers, _recomputed_layers)
