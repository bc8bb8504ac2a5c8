"""Recipes at their full size, built without data by the code of a run, against the planner's arithmetic. One process for all of them."""

from __future__ import annotations

from typing import Any

import pytest

from asft_nemo.commands.simulation import Job, simulated
from asft_nemo.config.load import compose
from asft_nemo.config.recipes import known_recipes, recipe_model
from asft_nemo.config.schema import replace
from asft_nemo.errors import ConfigError
from asft_nemo.planner.memory import StageMemory, memory_of
from asft_nemo.planner.precision import widths_of
from asft_nemo.planner.published import spec_of_recipe

LONG = "qwen25_72b_32k_64gpu_h100"
RECIPES = [name for name in known_recipes() if recipe_model(name) is not None]
EXACT = ("weights", "gradients", "optimizer", "reference", "reference_hidden")
# (name, recipe, settings, whether a micro batch is traced)
CASES: list[tuple[str, str, list[str], bool]] = [
    *((name, name, [], name in ("qwen25_1p5b", "qwen25_72b", LONG)) for name in RECIPES),
    *(
        (f"{name}-lora", name, ["peft=lora", "reference=adapter_disabled"], False)
        for name in RECIPES
        if name != LONG
    ),
    ("lora-resident", "qwen25_7b", ["peft=lora", "reference=resident", "run.world_size=8"], False),
    ("offloaded", "qwen25_32b", ["reference=offloaded"], False),
    ("cached", "qwen25_7b", ["reference=cached", "run.world_size=8"], False),
    ("recomputed", "qwen25_1p5b", ["recompute.granularity=full"], True),
]


def job(recipe: str, settings: list[str], traced: bool) -> Job:
    run = compose(
        [f"recipe={recipe}", "objective=asft", "model.path=as published", *settings], check_inputs=False
    )
    spec = spec_of_recipe(recipe)
    assert spec is not None
    return Job(run, spec, trace=traced)


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[dict[str, Any], StageMemory]]]:
    """Every pipeline stage of every case: as simulated, and as planned."""
    jobs = [job(recipe, settings, traced) for _, recipe, settings, traced in CASES]
    results = simulated(jobs)
    return {
        name: list(zip(result["stages"], memory_of(asked.run, asked.spec, widths_of(asked.run)), strict=True))
        for (name, *_), asked, result in zip(CASES, jobs, results, strict=True)
    }


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_what_stays_is_the_planners_to_the_byte(stages: dict[str, Any], name: str) -> None:
    for built, planned in stages[name]:
        assert built["parameters"] == planned.parameters.total
        assert {part: built[part] for part in EXACT} == {part: getattr(planned, part) for part in EXACT}


@pytest.mark.parametrize("name", [name for name, _, _, traced in CASES if traced])
def test_what_a_step_holds_is_near_the_planners(stages: dict[str, Any], name: str) -> None:
    traced = [pair for pair in stages[name] if pair[0]["peak"] is not None]
    assert len(traced) == min(len(stages[name]), 3)
    for built, planned in traced:
        assert built["passes_in_flight"] == planned.in_flight
        assert built["activations_in_flight"] == pytest.approx(planned.activations, rel=0.1)
        assert built["peak"] == pytest.approx(planned.peak, rel=0.1)


def test_counts_of_72b_are_those_of_nemos_own_model(stages: dict[str, Any]) -> None:
    """NeMo's Qwen25Config72B at TP8 PP4 VPP5, ranks 0, 8 and 24; the vocabulary is padded by 64 rows more of 8192 on each rank here."""
    counts = {built["rank"]: built["parameters"] for built, _ in stages["qwen25_72b"]}
    more = 64 * 8192
    assert counts == {
        0: 2_350_212_096 + more,
        8: 2_194_498_560,
        16: 2_194_498_560,
        24: 2_350_220_288 + more,
    }


def test_an_offloaded_reference_waits_on_the_host(stages: dict[str, Any]) -> None:
    for built, _ in stages["offloaded"]:
        assert built["reference_host"] == built["weights"]


def test_settings_that_break_a_rule_are_refused_before_anything_is_built() -> None:
    asked = job("qwen25_1p5b", [], False)
    with pytest.raises(ConfigError, match="tp_size=5 does not divide"):
        simulated([Job(replace(asked.run, {"parallel.tp_size": 5, "run.world_size": 5}), asked.spec)])
