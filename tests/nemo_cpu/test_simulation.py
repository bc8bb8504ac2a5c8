"""Recipes at their full size, built without data by the code of a run, against the planner's arithmetic. One process for many of them.

Every recipe is built stage by stage and counted; micro batches are traced through some, and through models of a few layers for what layers
have alike. `make simulate` traces all recipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from kept import some_of

from asft_nemo.commands.simulation import Job, simulated
from asft_nemo.config.load import compose
from asft_nemo.config.recipes import known_recipes, recipe_model
from asft_nemo.config.schema import RunConfig, to_dict
from asft_nemo.config.schema import replace as replace_settings
from asft_nemo.errors import ConfigError, LayoutError
from asft_nemo.planner.memory import StageMemory, memory_of
from asft_nemo.planner.precision import widths_of
from asft_nemo.planner.published import spec_of_recipe

LONG = "qwen25_72b_32k_64gpu_h100"
RECIPES = [name for name in known_recipes() if recipe_model(name) is not None]
TRACED = ("qwen25_1p5b", "qwen25_72b", LONG, "qwen25_32b_lora_4gpu_h100")
EXACT = ("weights", "gradients", "optimizer", "reference", "reference_hidden")
LORA = ("peft=lora", "reference=adapter_disabled")
MLP_AGAIN = ("recompute.granularity=selective", "recompute.modules=[mlp]")


@dataclass(frozen=True)
class Case:
    """A run that is simulated and planned.

    Attributes:
        recipe, settings: as on the command line, beside `objective=asft`.
        traced: whether a micro batch goes through it.
        layers: of a model that is cut short, for what every layer has alike; None for all.
        kernels: see `Job`.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    traced: bool = False
    layers: int | None = None
    kernels: str = "te"

    def job(self) -> Job:
        words = [f"recipe={self.recipe}", "objective=asft", "model.path=as published", *self.settings]
        spec = spec_of_recipe(self.recipe)
        assert spec is not None
        spec = replace(spec, num_layers=self.layers or spec.num_layers)
        return Job(compose(words, check_inputs=False), spec, self.kernels, self.traced)

    def plan(self, job: Job) -> tuple[StageMemory, ...]:
        """Of what is built: an FP8 run's bf16 twin."""
        run = bf16_twin(job.run)
        return memory_of(run, job.spec, replace(widths_of(run), kernels=self.kernels))


def bf16_twin(run: RunConfig) -> RunConfig:
    return replace_settings(run, {"precision": "bf16"}) if run.precision.startswith("fp8") else run


def built(name: str) -> str:
    """What a simulation of a recipe builds: the same for recipes that differ in their names or in FP8."""
    job = Case(name).job()
    twin = replace_settings(bf16_twin(job.run), {"recipe": "any", "run.dir": "any"})
    return json.dumps([to_dict(twin), asdict(job.spec)])


CASES = {
    **{name: Case(name, traced=name in TRACED) for name in {built(n): n for n in reversed(RECIPES)}.values()},
    "lora-resident": Case("qwen25_7b", ("peft=lora", "reference=resident", "run.world_size=8")),
    "offloaded": Case("qwen25_32b", ("reference=offloaded",)),
    "cached": Case("qwen25_7b", ("reference=cached", "run.world_size=8")),
    "recomputed": Case("qwen25_1p5b", ("recompute.granularity=full",), traced=True, layers=4),
    # adapters: with and without dropout, tokens shared by tensor ranks and not, some targets, both kinds of layers
    "lora-shared": Case("qwen25_72b", LORA, traced=True, layers=20),
    "lora-whole": Case("qwen25_1p5b", LORA, traced=True, layers=4),
    "lora-without-dropout": Case("qwen25_7b", (*LORA, "peft.dropout=0"), traced=True, layers=4),
    "lora-of-some": Case("qwen25_7b", (*LORA, "peft.targets=[linear_qkv,linear_fc2]"), traced=True, layers=4),
    "lora-local": Case("qwen25_7b", LORA, traced=True, layers=4, kernels="local"),
    "mlp-again": Case("qwen25_7b", MLP_AGAIN, traced=True, layers=4),
    "lora-mlp-again": Case("qwen25_72b", (*LORA, *MLP_AGAIN), traced=True, layers=20),
    "lora-local-mlp-again": Case("qwen25_7b", (*LORA, *MLP_AGAIN), traced=True, layers=4, kernels="local"),
    "local": Case("qwen25_7b", traced=True, layers=4, kernels="local"),
    "iw_sft": Case("qwen25_1p5b", ("objective=iw_sft",), traced=True, layers=4),
}


# what the planner has by another rule than to the byte
BESIDE = {
    "psft": Case("qwen25_1p5b", ("objective=psft",), traced=True, layers=4),
    "fp8": Case("qwen25_7b_full_8gpu_h100_fp8"),
    "state-offloaded": Case("qwen25_1p5b", ("optim.cpu_offload=0.5",), traced=True, layers=8),
    "state-all-offloaded": Case("qwen25_7b", ("optim.cpu_offload=1", "run.world_size=2"), layers=4),
}


ALL = {**CASES, **BESIDE}
# of every family one, of each kind of training, reference, layers and recomputation one
KEPT = (
    *(
        "qwen25_1p5b",
        "qwen25_7b_lora_1gpu_h100",
        "llama2_7b",
        "llama3_8b",
        "offloaded",
        "cached",
        "recomputed",
    ),
    *("lora-shared", "lora-local", "mlp-again", "iw_sft"),
)


class Simulations(dict[str, tuple[Job, dict[str, Any]]]):
    """Every case and what was simulated of it: one process for those that are kept and one for the others, when first asked for."""

    def __missing__(self, name: str) -> tuple[Job, dict[str, Any]]:
        kept = {*KEPT, *BESIDE}
        jobs = {other: case.job() for other, case in ALL.items() if (other in kept) == (name in kept)}
        self.update(zip(jobs, zip(jobs.values(), simulated([*jobs.values()]), strict=True), strict=True))
        return self[name]


class Stages(dict[str, list[tuple[dict[str, Any], StageMemory]]]):
    """Every pipeline stage of every case: as simulated, and as planned."""

    def __init__(self, results: Simulations):
        self.results = results

    def __missing__(self, name: str) -> list[tuple[dict[str, Any], StageMemory]]:
        job, result = self.results[name]
        self[name] = list(zip(result["stages"], ALL[name].plan(job), strict=True))
        return self[name]


def kept_of(names: Iterable[str]) -> list[Any]:
    names = list(names)
    return some_of(names, [name for name in KEPT if name in names])


@pytest.fixture(scope="module")
def results() -> Simulations:
    return Simulations()


@pytest.fixture(scope="module")
def stages(results: Simulations) -> Stages:
    return Stages(results)


@pytest.mark.parametrize("name", kept_of(CASES))
def test_what_stays_is_the_planners_to_the_byte(stages: Stages, name: str) -> None:
    for built, planned in stages[name]:
        assert built["parameters"] == planned.parameters.total
        assert {part: built[part] for part in EXACT} == {part: getattr(planned, part) for part in EXACT}


@pytest.mark.parametrize("name", kept_of([name for name, case in CASES.items() if case.traced]))
def test_what_a_step_holds_is_near_the_planners(stages: Stages, name: str) -> None:
    traced = [pair for pair in stages[name] if pair[0]["peak"] is not None]
    assert len(traced) == min(len(stages[name]), 3)
    for built, planned in traced:
        assert built["passes_in_flight"] == planned.in_flight
        assert built["activations_in_flight"] == pytest.approx(planned.activations, rel=0.1)
        assert built["peak"] == pytest.approx(planned.peak, rel=0.1)


@pytest.mark.long
def test_counts_of_72b_are_those_of_nemos_own_model(stages: Stages) -> None:
    """NeMo's Qwen25Config72B at TP8 PP4 VPP5, ranks 0, 8 and 24; the vocabulary is padded by 64 rows more of 8192 on each rank here."""
    counts = {built["rank"]: built["parameters"] for built, _ in stages["qwen25_72b"]}
    more = 64 * 8192
    assert counts == {
        0: 2_350_212_096 + more,
        8: 2_194_498_560,
        16: 2_194_498_560,
        24: 2_350_220_288 + more,
    }


def test_every_recipe_is_simulated_itself_or_as_another_that_builds_the_same() -> None:
    simulated_ones = {built(name) for name in CASES if name in RECIPES}
    assert {name for name in RECIPES if built(name) not in simulated_ones} == set()


def test_fp8_is_simulated_as_bf16_and_says_so(results: Simulations, stages: Stages) -> None:
    job, result = results["fp8"]
    assert (job.run.precision, result["precision"]) == ("fp8_current", "bf16")
    assert "precision=fp8_current is simulated as bf16" in result["notes"][0]
    [(counted, planned)] = stages["fp8"]
    [own] = memory_of(job.run, job.spec, widths_of(job.run))
    assert counted["parameters"] == planned.parameters.total == own.parameters.total
    assert counted["weights"] == planned.weights < own.weights


def test_an_offloaded_reference_waits_on_the_host(stages: Stages) -> None:
    for built, planned in stages["offloaded"]:
        assert built["reference_host"] == built["weights"] - built["reference"] == planned.reference_host


def test_a_snapshot_is_held_as_a_reference_is(stages: Stages) -> None:
    [(built, planned)] = stages["psft"]
    assert built["snapshot"] == planned.reference == built["weights"]
    assert built["activations_in_flight"] == pytest.approx(planned.activations, rel=0.1)
    assert built["peak"] == pytest.approx(planned.peak, rel=0.1)


def test_a_share_of_the_optimizer_waits_on_the_host(stages: Stages) -> None:
    """Megatron moves whole tensors until it has the share; the one that is too many is a layer's here, at most a gate and up projection."""
    [(built, planned)] = stages["state-offloaded"]
    spec = BESIDE["state-offloaded"].job().spec
    # 12 bytes a parameter on the device
    moved = built["parameters"] - built["optimizer"] / 12
    assert 0 <= moved - built["parameters"] / 2 <= 2 * spec.ffn_hidden_size * spec.hidden_size
    # 16 on the host, where the gradients are a second time, in pinned memory: up to 4 more
    assert 16 * moved <= built["optimizer_host"] <= 20 * moved
    assert built["optimizer_host"] == pytest.approx(planned.optimizer_host, rel=0.1)
    assert built["peak"] == pytest.approx(planned.peak, rel=0.1)


def test_all_of_the_optimizer_waits_on_the_host_to_the_byte(stages: Stages) -> None:
    [(built, planned)] = stages["state-all-offloaded"]
    assert built["optimizer"] == planned.optimizer == 0
    assert built["optimizer_host"] == planned.optimizer_host > 16 * built["parameters"]


def test_settings_that_break_a_rule_are_refused_before_anything_is_built() -> None:
    job = Case("qwen25_1p5b").job()
    broken = replace_settings(job.run, {"parallel.tp_size": 5, "run.world_size": 5})
    with pytest.raises(ConfigError, match="tp_size=5 does not divide"):
        simulated([replace(job, run=broken)])


def test_what_megatron_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from asft_nemo.nemo import build
    from asft_nemo.nemo.simulate.world import config_on_gpu

    def refuse(*_: Any) -> None:
        assert 5 % 2 == 0, "5 layers do\n not divide"

    job = Case("qwen25_1p5b").job()
    monkeypatch.setattr(build, "model_config", refuse)
    with pytest.raises(LayoutError, match=r"^Megatron refuses recipe=qwen25_1p5b .*: 5 layers do not divide"):
        config_on_gpu(job.run, job.spec, kernels="te")
