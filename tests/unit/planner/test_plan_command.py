"""`asft plan`: what it prints, its exit codes, its sentences, and that it answers at once."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from asft_nemo import cli
from asft_nemo.config.paths import project_dir
from asft_nemo.planner.plan import PARTS

LONG = "qwen25_72b_32k_64gpu_h100"


@functools.cache
def plan(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; composing a run takes most of a second, so each is done once."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["plan", *words])
    return code, out.getvalue(), err.getvalue()


def values_of(*words: str) -> dict[str, Any]:
    code, out, _ = plan("--json", *words)
    values = json.loads(out)
    assert code == (0 if values["fits"] else 2)
    return values


def test_a_recipe_is_planned_without_its_weights() -> None:
    code, out, err = plan("recipe=qwen25_72b", "objective=asft")
    assert (code, err) == (0, "")
    assert "72,706,203,648 parameters" in out
    assert "; sizes of Qwen/Qwen2.5-72B as published\n" in out
    assert "32 x h100-80gb: TP8 PP4 VPP5 DP1" in out
    assert "fits: " in out
    for form in ("resident", "offloaded", "cached"):
        assert f"\n{form} " in out


def test_json_has_every_part_of_every_stage() -> None:
    values = values_of("recipe=qwen25_72b", "objective=asft")
    assert (values["gpus"], values["parameters"], values["fullest_stage"]) == (32, 72_706_203_648, 0)
    assert [stage["layers"] for stage in values["stages"]] == [20] * 4
    for stage in values["stages"]:
        assert set(stage["bytes"]) == {*PARTS, "peak"}
        assert stage["bytes"]["peak"] <= sum(stage["bytes"][part] for part in PARTS)
    step = values["step"]
    parts = sum(step[f"{part}_seconds"] for part in ("training", "bubble", "reference", "update"))
    assert step["seconds"] == pytest.approx(parts)
    assert 0 < step["mfu"] < 1
    assert set(values["reference_forms"]) == {"resident", "offloaded", "cached"}
    assert values["reference_forms"]["cached"]["extra_seconds"] < 0.03 * step["seconds"]


def test_a_whole_run_is_told_in_hours_and_its_cache_in_bytes() -> None:
    """10 million learned tokens of a 7B model in bf16 take 72 GB (docs/reference.md)."""
    words = ["recipe=qwen25_7b", "objective=asft", "run.world_size=8"]
    values = values_of(*words)
    step, total = values["step"], values["total"]
    assert (total["steps"], total["tokens"]) == (None, 10**9)
    assert total["cache_bytes"] / 100 == pytest.approx(72e9, rel=0.01)
    speed = step["tokens_per_second_per_gpu"] * values["gpus"]
    assert total["hours"] == pytest.approx(1e9 / speed / 3600)
    # with the cache a step is shorter, so that rows are read faster than they would be beside a resident reference
    assert total["read_bytes_per_second"] > speed * 3584 * 2
    some = values_of(*words, "trainer.max_steps=100")["total"]
    assert some["tokens"] == 100 * step["tokens"]
    assert some["hours"] == pytest.approx(100 * step["seconds"] / 3600)
    assert "\n100 steps: " in plan(*words, "trainer.max_steps=100")[1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["recipe=qwen25_72b", "--gpu", "A100-40GB"], "the optimizer's state"),
        (["recipe=qwen25_72b", "data.sequence_length=16384"], "the activations"),
        # twice as many stages are not enough, four times as many are
        (
            ["recipe=qwen25_72b", "parallel.pp_size=1", "parallel.vpp_size=null", "run.world_size=8"],
            "the optimizer's state",
        ),
        (["recipe=qwen25_7b", "parallel.tp_size=1", "parallel.sequence_parallel=false"], "the gradients"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(words: list[str], part: str) -> None:
    words = [*words, "objective=asft"]
    code, out, _ = plan(*words)
    assert code == 2
    verdict = out.strip().splitlines()[-1]
    assert verdict.startswith("does not fit: stage 0 needs ")
    assert f"the largest part is {part} with" in verdict
    # the first cure is one: with it the same command ends well
    cure = verdict.partition("what would fit: ")[2].partition(";")[0].split()
    assert plan(*words, *cure)[0] == 0


def test_gpus_that_cannot_compute_in_fp8_are_no_cure_for_what_does() -> None:
    """An A100 of 80 GB has a little more memory than an H100."""
    code, out, err = plan(
        "recipe=qwen25_72b_lora_8gpu_h100_fp8", "objective=asft", "data.sequence_length=4096"
    )
    assert (code, err) == (2, "")
    assert "--gpu h200" in out.splitlines()[-1]
    assert "a100" not in out.splitlines()[-1]


def test_activations_that_are_too_large_ask_for_recomputation() -> None:
    code, out, _ = plan(f"recipe={LONG}", "objective=asft", "recompute.granularity=none")
    assert code == 2
    assert "the largest part is the activations" in out
    assert "recompute.granularity=full" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["recipe=qwen25_72b", "objective=asft", "parallel.tp_size=3"],
            "does not divide the model's 64 attention heads",
        ),
        (
            ["recipe=qwen25_72b", "objective=asft", "data.sequence_length=262144"],
            "exceeds the model's 131072 positions",
        ),
        (
            ["recipe=tiny_cpu", "objective=asft", "model.path=nowhere"],
            "model.path=nowhere is not a directory",
        ),
        (["recipe=qwen25_72b", "objective=asft", "--gpu", "v100"], "unknown GPU 'v100': set --gpu to one of"),
        (["recipe=qwen25_72b", "objective=asft", "run.world_size=33"], "run.world_size=33 is not a multiple"),
        (
            ["recipe=qwen25_7b", "objective=sft", "precision=fp8_current", "--gpu", "a100-80gb"],
            "precision=fp8_current needs a GPU that computes in FP8, and a100-80gb does not: set precision=bf16",
        ),
        (
            ["recipe=qwen25_7b", "objective=asft", "reference.precision=fp8", "--gpu", "a100-40gb"],
            "reference.precision=fp8 needs a GPU that computes in FP8",
        ),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    code, out, err = plan(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_fp32_has_no_tensor_cores() -> None:
    seconds = {
        precision: values_of("recipe=qwen25_7b", "objective=sft", f"precision={precision}")["step"]["seconds"]
        for precision in ("fp32", "bf16")
    }
    assert seconds["fp32"] > 5 * seconds["bf16"]


def test_the_last_stage_is_explained_and_relieved() -> None:
    """Llama's head is small beside its layers; a 7B model's with a vocabulary of 152,064 is not."""
    words = ["recipe=qwen25_7b", "objective=asft", "parallel.pp_size=4", "run.world_size=8"]
    _, out, _ = plan(*words)
    explained = next(line for line in out.splitlines() if line.startswith("the last stage also has"))
    advice = out.splitlines()[out.splitlines().index(explained) + 1]
    assert "of them the reference's head product" in explained
    assert "% shorter" in advice
    before = values_of(*words)["step"]["seconds"]
    after = values_of(*words, *advice.partition(" would make")[0].split())["step"]["seconds"]
    gain = float(advice.rpartition("a step ")[2].partition(" %")[0])
    assert 100 * (1 - after / before) == pytest.approx(gain, abs=0.06)


def test_search_gives_layouts_that_fit_and_reasons() -> None:
    code, out, _ = plan("recipe=qwen25_32b", "objective=asft", "--search")
    assert code == 0
    assert "layouts fit; tokens/s/GPU" in out
    assert "need too much, largest is " in out
    best = out.partition("GiB a GPU:\n")[2].splitlines()[0].split()
    assert best[2].startswith("parallel.tp_size=")
    # what it recommends keeps the rules, fits, and is as fast as it said
    values = values_of("recipe=qwen25_32b", "objective=asft", "run.world_size=16", *best[2:])
    assert values["step"]["tokens_per_second_per_gpu"] == pytest.approx(
        float(best[0].replace(",", "")), abs=1
    )


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(["parallel.vpp_size=7"], id="one that is tried anyway"),
        pytest.param(["parallel.last_stage_layers=13"], id="unequal shares"),
        pytest.param(["recompute.granularity=selective"], id="recomputed in part"),
    ],
)
def test_the_runs_own_layout_is_among_those_of_a_search(own: list[str]) -> None:
    words = ["recipe=qwen25_7b", "objective=asft", "parallel.pp_size=2", *own]
    values = values_of(*words, "--search")
    [found] = [layout for layout in values["layouts"] if layout["own"]]
    assert not found["fits"] or found["seconds"] == values["step"]["seconds"]
    told = [line for line in plan(*words, "--search")[1].splitlines() if "this run" in line]
    assert len(told) == 1


def test_a_recipe_is_planned_for_its_own_gpu() -> None:
    recipe = "recipe=qwen25_72b_full_16gpu_h200"
    values = values_of(recipe, "objective=asft")
    assert (values["gpu"], values["fits"]) == ("h200", True)
    assert not values_of(recipe, "objective=asft", "--gpu", "h100-80gb")["fits"]


def test_the_tiny_model_is_counted_as_its_run_counts_it() -> None:
    """`policy_parameter_bytes` in the summary.json of a run of this recipe on one rank, and the file the weights come from, which is in bf16 and has a header."""
    values = values_of("recipe=tiny_cpu", "objective=asft")
    assert values["sizes_of"].endswith("/assets/tiny-base")
    [stage] = values["stages"]
    file = project_dir() / "assets" / "tiny-base" / "model.safetensors"
    assert 2 * stage["parameters"] == pytest.approx(file.stat().st_size, rel=0.01)
    assert stage["bytes"]["weights"] == 10_503_168
    assert stage["bytes"]["weights"] == stage["bytes"]["reference"] == 4 * stage["parameters"]
    assert stage["bytes"]["gradients"] == stage["bytes"]["weights"]
    assert stage["bytes"]["optimizer"] == 2 * stage["bytes"]["weights"]


def test_it_imports_no_torch_and_answers_in_a_second() -> None:
    code = (
        "import sys; from asft_nemo import cli; cli.main(['plan', 'recipe=qwen25_72b', 'objective=asft', '--json']);"
        "print([name for name in ('torch', 'numpy', 'nemo', 'megatron', 'transformers') if name in sys.modules])"
    )
    before = os.times()  # processor time: other work on the machine must not decide
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    after = os.times()
    assert done.stdout.splitlines()[-1] == "[]"
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 5, "a second on an idle machine"


def test_groups_over_the_network_are_told_and_context_parallel_rings_take_time() -> None:
    words = ["recipe=qwen25_72b", "objective=sft", "run.world_size=64"]
    assert "reach beyond nodes of cluster.gpus_per_node=4" in plan(*words, "cluster.gpus_per_node=4")[1]
    assert "reach beyond" not in plan(*words)[1]
    # 128 tokens a rank attend faster than 15 other ranks' keys and values come over the network
    ring = ["recipe=qwen25_32b", "objective=sft", "run.world_size=64", "parallel.pp_size=4"]
    speeds = [
        values_of(
            *ring, f"parallel.tp_size={tp}", f"parallel.cp_size={cp}", f"parallel.sequence_parallel={tp > 1}"
        )["step"]["tokens_per_second_per_gpu"]
        for tp, cp in ((4, 1), (1, 16))
    ]
    assert speeds[1] < speeds[0]


def test_a_simulation_is_told_in_gb_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("weights", "gradients", "optimizer", "reference", "reference_hidden")
    stage = dict.fromkeys(keys, 2 * 10**9) | {"stage": 1, "parameters": 10**9}
    untraced = stage | dict.fromkeys(("activations_in_flight", "loss", "peak"))
    asked: list[Any] = []

    def simulated(jobs: Any) -> list[dict[str, Any]]:
        asked.extend(jobs)
        return [{"kernels": "te", "precision": "bf16", "notes": ["as its twin"], "stages": [untraced]}]

    monkeypatch.setattr("asft_nemo.commands.simulation.simulated", simulated)
    code, out, _ = plan.__wrapped__("recipe=qwen25_7b", "objective=sft", "--simulate")
    assert code == 0
    assert (asked[0].run.recipe, asked[0].kernels) == ("qwen25_7b", "te")
    told = out.partition("\n\nsimulated: ")[2].splitlines()
    assert told[1] == "as its twin"
    assert told[2].startswith("GB on each GPU")
    assert told[4].split() == ["1", *["2.00"] * 5, "-", "-", "-", "1,000,000,000"]


def test_layouts_are_searched_for_the_cluster_s_nodes() -> None:
    small = values_of(
        "recipe=qwen25_7b", "objective=sft", "--search", "cluster.gpus_per_node=2", "run.world_size=8"
    )
    sizes = {one["settings"].split()[0] for one in small["layouts"] if not one["own"]}
    assert sizes == {"parallel.tp_size=1", "parallel.tp_size=2"}
