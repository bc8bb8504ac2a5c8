"""Recipes hold only values, none of them a default; their names tell the truth, and they fit the GPUs in their names."""

from __future__ import annotations

import functools
import importlib
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.model_shape import read_model_shape
from asft_nemo.config.paths import project_dir
from asft_nemo.config.recipes import known_recipes, recipe_fragment, recipe_gpu, recipe_model
from asft_nemo.config.rules import check
from asft_nemo.config.schema import RunConfig, data_parallel_size, num_microbatches, replace, walk
from asft_nemo.planner.gpus import gpu
from asft_nemo.planner.plan import plan_of
from asft_nemo.planner.published import spec_of_recipe
from asft_nemo.planner.time import shape_of
from recipes import base

MODELS = {
    "qwen25_1p5b": "Qwen/Qwen2.5-1.5B",
    "qwen25_7b": "Qwen/Qwen2.5-7B",
    "qwen25_32b": "Qwen/Qwen2.5-32B",
    "qwen25_72b": "Qwen/Qwen2.5-72B",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B",
}
#: GPUs of a bare name, which does not say them
BARE = {"1p5b": 1, "7b": 8, "8b": 8, "32b": 16, "70b": 32, "72b": 32}
NAME = re.compile(
    r"(?P<model>[a-z]+\d+_(?P<size>\w+?b))(_(?P<thousands>\d+)k)?(_(?P<kind>full|lora))?"
    r"((_(?P<gpus>\d+)gpu_(?P<gpu>h100|h200|a100_40gb))(_(?P<precision>fp8|fp8_blockwise))?)?"
)
GPU_NAMES = {"h100": "h100-80gb", "h200": "h200", "a100_40gb": "a100-40gb"}
PRECISIONS = {"fp8": "fp8_current", "fp8_blockwise": "fp8_blockwise"}
#: Share of a GPU's memory that is left free, beside what the planner adds for the allocator and outside torch.
MARGIN = 0.10
#: docs/planner.md: these leave that much at 2,048 tokens and not at 4,096
SHORT = {
    "llama3_70b_lora_8gpu_h100_fp8",
    "qwen25_72b_lora_8gpu_h100_fp8",
    "qwen25_72b_full_64gpu_a100_40gb",
}
RECIPES = tuple(name for name in known_recipes() if name != "tiny_cpu")


@dataclass(frozen=True)
class Told:
    """What a name says."""

    model: str
    gpus: int
    gpu: str
    precision: str
    peft: str
    tokens: int | None

    @classmethod
    def by(cls, name: str) -> Told:
        match = NAME.fullmatch(name)
        assert match is not None, f"{name} is not <model>_<full|lora>_<n>gpu_<gpu>[_<precision>]"
        thousands = match["thousands"]
        return cls(
            MODELS[match["model"]],
            int(match["gpus"] or BARE[match["size"]]),
            GPU_NAMES[match["gpu"] or "h100"],
            PRECISIONS.get(match["precision"] or "", "bf16"),
            "lora" if match["kind"] == "lora" else "none",
            1024 * int(thousands) if thousands else None,
        )


@functools.cache
def run_of(name: str) -> RunConfig:
    return compose([f"recipe={name}", "objective=asft", "model.path=nowhere"], check_inputs=False)


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_every_model_has_a_bare_name_and_lora() -> None:
    assert set(MODELS) <= set(RECIPES)
    assert {Told.by(name).model for name in RECIPES if "_lora_" in name} == set(MODELS.values())
    assert {Told.by(name).precision for name in RECIPES} == {"bf16", *PRECISIONS.values()}


@pytest.mark.parametrize("name", known_recipes())
def test_recipe_says_only_what_differs_from_the_schema(name: str) -> None:
    defaults = dict(walk(RunConfig()))
    for key, value in leaves(recipe_fragment(name)).items():
        assert key in defaults
        assert value != defaults[key], f"{key}={value} is the schema's default"


@pytest.mark.parametrize("name", RECIPES)
def test_the_name_tells_the_truth(name: str) -> None:
    run, told = run_of(name), Told.by(name)
    layout = run.parallel
    assert (recipe_model(name), recipe_gpu(name)) == (told.model, told.gpu)
    assert (run.precision, run.peft.name, run.run.world_size) == (told.precision, told.peft, told.gpus)
    assert layout.tp_size * layout.pp_size * layout.cp_size * data_parallel_size(run) == told.gpus
    assert run.reference.form == ("adapter_disabled" if told.peft == "lora" else "resident")
    if told.tokens is not None:
        assert run.data.sequence_length == told.tokens


@pytest.mark.parametrize("name", RECIPES)
def test_its_rules_pass_on_its_model_with_data_parallelism_too(name: str) -> None:
    run, spec = run_of(name), spec_of_recipe(name)
    assert spec is not None
    check(run, shape=shape_of(spec))
    check(replace(run, {"run.world_size": 2 * run.run.world_size}), shape=shape_of(spec))


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_the_gpus_of_its_name_with_a_margin(name: str) -> None:
    run, spec, device = run_of(name), spec_of_recipe(name), gpu(Told.by(name).gpu)
    assert spec is not None
    fits = {}
    for tokens in {2048, 4096} if Told.by(name).tokens is None else {run.data.sequence_length}:
        plan = plan_of(replace(run, {"data.sequence_length": tokens}), spec, device)
        fits[tokens] = plan.needed <= (1 - MARGIN) * device.memory
    expected = dict.fromkeys(fits, True)
    assert fits == (expected | {4096: False} if name in SHORT else expected)


#: Minutes between two checkpoints, by the plan at the recipe's own length: what a failed node costs at most, and what the writing is a share of.
LEAST_MINUTES, MOST_MINUTES = 15, 60
A_NODE = 8


@pytest.mark.parametrize("name", [name for name in RECIPES if Told.by(name).gpus > A_NODE])
def test_a_failed_node_costs_an_hour_at_most(name: str) -> None:
    run, spec = run_of(name), spec_of_recipe(name)
    assert spec is not None
    every = run.trainer.checkpoint_every
    assert every is not None, "one failed node of several loses the whole run"
    minutes = every * plan_of(run, spec, gpu(Told.by(name).gpu)).step.seconds / 60
    assert LEAST_MINUTES <= minutes <= MOST_MINUTES


@pytest.mark.parametrize("name", [name for name in RECIPES if run_of(name).data.packing])
def test_a_packed_batch_leaves_an_epoch_its_steps_and_the_pipeline_its_work(name: str) -> None:
    """A recipe that packs counts rows of many examples: 100,000 of 300 tokens are fifty steps and more, most of them behind the warm-up."""
    run, spec = run_of(name), spec_of_recipe(name)
    assert spec is not None
    rows = math.ceil(100_000 * 300 / run.data.sequence_length)
    assert rows / run.trainer.global_batch_size >= 50
    # one more data-parallel rank divides it still
    assert num_microbatches(run) % (2 * run.parallel.pp_size) == 0
    step = plan_of(run, spec, gpu(Told.by(name).gpu)).step
    assert step.bubble / (step.training + step.bubble) < 0.05


PAGE = project_dir() / "docs" / "planner.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="no docs here: not a clone")
@pytest.mark.parametrize("name", sorted(SHORT))
def test_the_page_has_the_numbers_of_those_without_a_margin(name: str) -> None:
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    run, spec, device = run_of(name), spec_of_recipe(name), gpu(Told.by(name).gpu)
    assert spec is not None
    again = {"recompute.granularity": "selective", "recompute.modules": ("mlp",)}
    cells = [f"{device.memory / 2**30:.1f}"]
    for tokens, changes in ((512, {}), (2048, {}), (4096, {}), (4096, again)):
        plan = plan_of(replace(run, {"data.sequence_length": tokens, **changes}), spec, device)
        cells.append(f"{plan.needed / 2**30:.1f}{'' if plan.fits else ': does not fit'}")
    assert line == f"| `{name}` | {' | '.join(cells)} |"


def test_tiny_cpu_is_the_shipped_model() -> None:
    run = compose(["recipe=tiny_cpu", "objective=asft"], check_inputs=False)
    assert run.precision == "fp32"
    assert read_model_shape(run.model.path).num_layers == 4
    assert run.data.sequence_length <= read_model_shape(run.model.path).max_positions


def test_fragments_are_fresh() -> None:
    first = recipe_fragment("qwen25_72b")
    first["parallel"]["tp_size"] = 1  # type: ignore[index]
    assert recipe_fragment("qwen25_72b")["parallel"]["tp_size"] == 8


def test_importing_all_recipes_imports_nothing_heavy() -> None:
    code = (
        "import sys; from asft_nemo.config.recipes import known_recipes, recipe_fragment;"
        "[recipe_fragment(name) for name in known_recipes()];"
        "print([name for name in ('torch', 'nemo', 'nemo_run', 'hydra') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("name", known_recipes())
def test_the_task_is_the_recipes_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "finetune_partial", lambda recipe, overrides: (recipe, overrides))
    task = importlib.import_module(f"recipes.{name}").finetune_recipe(["objective=asft"])
    assert task == (name, ["objective=asft"])


@pytest.mark.nemo
@pytest.mark.slow
def test_finetune_recipe_is_a_nemo_run_task() -> None:
    """In a process of its own, because nemo_run takes seconds to import."""
    code = """
import nemo_run
from asft_nemo.config.schema import from_dict, to_dict
from asft_nemo.train import train
from recipes.qwen25_72b_full_32gpu_h100_fp8 import finetune_recipe

task = finetune_recipe(["objective=asft", "model.path=nowhere"])
assert isinstance(task, nemo_run.Partial) and task.__fn_or_cls__ is train
task.run.optim.lr = 1e-5
built = nemo_run.core.serialization.zlib_json.ZlibJSONSerializer()
again = built.deserialize(built.serialize(task))
import fiddle
run = from_dict(to_dict(fiddle.build(again).keywords["run"]))
assert run.parallel.tp_size == 8 and run.optim.lr == 1e-5 and run.run.world_size == 32, run
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=240)
