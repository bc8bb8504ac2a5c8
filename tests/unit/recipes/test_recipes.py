"""Recipes hold only values, none of them a default, and fit their models."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace as replace_fields
from typing import Any

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.model_shape import ModelShape, read_model_shape
from asft_nemo.config.recipes import known_recipes, recipe_fragment
from asft_nemo.config.rules import check
from asft_nemo.config.schema import RunConfig, replace, walk
from asft_nemo.planner.gpus import gpu
from asft_nemo.planner.plan import plan_of
from asft_nemo.planner.published import spec_of_recipe

# layers, hidden, heads, kv heads, feed-forward, vocabulary, positions: from the models' published config.json.
QWEN25_72B = ModelShape(80, 8192, 64, 8, 29568, 152064, 131072)
SHAPES = {
    "qwen25_1p5b": ModelShape(28, 1536, 12, 2, 8960, 151936, 131072),
    "qwen25_7b": ModelShape(28, 3584, 28, 4, 18944, 152064, 131072),
    "qwen25_32b": ModelShape(64, 5120, 40, 8, 27648, 152064, 131072),
    "qwen25_72b": QWEN25_72B,
    # the Instruct model's config.json says 32,768 positions
    "qwen25_72b_32k_64gpu_h100": replace_fields(QWEN25_72B, max_positions=32768),
}
GPUS = {
    "qwen25_1p5b": 1,
    "qwen25_7b": 8,
    "qwen25_32b": 16,
    "qwen25_72b": 32,
    "qwen25_72b_32k_64gpu_h100": 64,
}


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_known_recipes() -> None:
    assert set(known_recipes()) == {"tiny_cpu", *SHAPES}


@pytest.mark.parametrize("name", known_recipes())
def test_recipe_says_only_what_differs_from_the_schema(name: str) -> None:
    defaults = dict(walk(RunConfig()))
    for key, value in leaves(recipe_fragment(name)).items():
        assert key in defaults
        assert value != defaults[key], f"{key}={value} is the schema's default"


@pytest.mark.parametrize("name", SHAPES)
def test_layout_fits_the_model(name: str) -> None:
    run = compose([f"recipe={name}", "objective=asft", "model.path=nowhere"], check_inputs=False)
    check(run, shape=SHAPES[name])
    assert run.run.world_size == GPUS[name]
    assert run.precision == "bf16"
    # A data-parallel run of the same layout fits too.
    check(replace(run, {"run.world_size": 2 * GPUS[name]}), shape=SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_recipe_fits_the_gpus_it_is_made_for(name: str) -> None:
    run = compose([f"recipe={name}", "objective=asft", "model.path=nowhere"], check_inputs=False)
    spec = spec_of_recipe(name)
    assert spec is not None
    plan = plan_of(run, spec, gpu("h100-80gb"))
    assert plan.fits, (plan.needed, plan.gpu.memory)


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


@pytest.mark.nemo
@pytest.mark.slow
def test_finetune_recipe_is_a_nemo_run_task() -> None:
    """In a process of its own, because nemo_run takes seconds to import."""
    code = """
import nemo_run
from asft_nemo.config.schema import from_dict, to_dict
from asft_nemo.train import train
from recipes.qwen25_72b import finetune_recipe

task = finetune_recipe(["objective=asft", "model.path=nowhere"])
assert isinstance(task, nemo_run.Partial) and task.__fn_or_cls__ is train
task.run.optim.lr = 1e-5
built = nemo_run.core.serialization.zlib_json.ZlibJSONSerializer()
again = built.deserialize(built.serialize(task))
import fiddle
run = from_dict(to_dict(fiddle.build(again).keywords["run"]))
assert run.parallel.tp_size == 8 and run.optim.lr == 1e-5 and run.run.world_size == 32, run
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
