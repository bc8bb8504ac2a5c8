"""The planner against what real runs of the tiny recipe allocate: every tensor that torch makes on a CPU rank, until it is freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import run_config
from ranks import RankGroup
from real_runs import TP2_PP2

from asft_nemo.config.recipes import recipe_fragment
from asft_nemo.model import read_model_spec
from asft_nemo.planner.memory import memory_of
from asft_nemo.planner.precision import widths_of

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc]

EXACT = ("weights", "gradients", "optimizer", "reference", "reference_hidden")
RANKS = 4


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted settings of nested ones."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    "layout",
    [{}, {**TP2_PP2, "parallel.sequence_parallel": True, "data.sequence_length": 512}],
    ids=["TP1 PP1", "TP2 PP2"],
)
def test_the_tiny_recipe_takes_the_bytes_that_are_planned(
    ranks4: RankGroup, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Every token learned, as the planner assumes."""
    settings = {
        **flat(recipe_fragment("tiny_cpu")),
        **layout,
        "objective.name": "asft",
        "run.world_size": RANKS,
        "run.dir": str(tmp_path / "run"),
        "trainer.max_steps": 2,
    }
    run = run_config(settings)
    found = ranks4.run("allocation_jobs:measure", settings=settings, valid=[run.data.sequence_length])
    stages = memory_of(run, read_model_spec(Path(run.model.path)), widths_of(run))
    for rank, measured in enumerate(found):
        planned = stages[rank * len(stages) // RANKS]
        assert measured["parameters"] == planned.parameters.total
        assert {part: measured[part] for part in EXACT} == {part: getattr(planned, part) for part in EXACT}
        assert measured["peak"] == pytest.approx(planned.peak, rel=0.05)
