"""The GPU check's parts that train: their arithmetic, and the law of the real shapes; test_gpu_check_runs.py runs them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from bench import gpu_cluster, gpu_steps  # noqa: E402
from bench.gpu_parts import Check, SkipPart  # noqa: E402
from bench.gpu_ranks import RankFailed  # noqa: E402


def run_of(
    form: str, seconds: float, operations: float, peak: int | None = 1000, **more: Any
) -> dict[str, Any]:
    return {
        "form": form,
        "seconds": [2 * seconds, seconds, 0.9 * seconds],
        "operations": operations,
        "peak_bytes": peak,
        "learned_share": 0.7,
        "mfu": None,
        "reference_seconds": [0.5, 0.5],
        "reference_host_bytes": 0,
        "copy_seconds": [],
        **more,
    }


RUNS = [
    run_of("sft", 1.0, 3e12),
    run_of("cached", 1.155, 3.15e12, 1040),
    run_of("sft", 1.2, 3e12),
    run_of("offloaded", 1.7, 4e12, 1300, reference_seconds=[0.7, 0.7], copy_seconds=[0.4, 0.4]),
    run_of("sft", 1.2, 3e12),
    {"form": "resident", "failed": "the GPU's memory does not hold it"},
    run_of("sft", 1.2, 3e12),
]


def test_a_form_is_held_against_the_runs_around_it_and_the_law() -> None:
    rows = gpu_steps.compared(RUNS)
    assert [row["form"] for row in rows] == ["cached", "offloaded", "resident"]
    assert rows[0]["ratio"] == pytest.approx(1.05), "clocks that drift from 1.0 to 1.2 do not count"
    assert rows[0]["law"] == pytest.approx(1.05)
    assert rows[0]["ratio_of_least"] == pytest.approx(1.155)
    bars = gpu_steps.bars(rows, gpu_steps.FULL)
    assert bars["ratio_cached"]["measured"] <= bars["ratio_cached"]["limit"] == pytest.approx(1.08)
    assert bars["ratio_offloaded"]["measured"] > bars["ratio_offloaded"]["limit"]
    assert bars["peak_cached"] == {"measured": 1.04, "limit": 1.05}
    assert bars["peak_offloaded"]["measured"] == 1.3
    assert bars["ratio_resident"] == bars["peak_resident"] == {"reason": RUNS[5]["failed"]}
    gone = gpu_steps.compared([RUNS[0], RUNS[1], {"form": "sft", "failed": "x"}])
    assert gone == [{"form": "cached", "failed": "x"}]


def test_what_the_resident_pass_takes_less_is_what_is_not_hidden() -> None:
    resident = run_of("resident", 1.6, 4e12)
    found = gpu_steps.overlap([RUNS[3], resident])
    assert found is not None
    assert found["hidden_share"] == pytest.approx(0.5), "0.2 of 0.4 s shows"
    assert gpu_steps.overlap(RUNS) is None, "the resident run failed"
    assert gpu_steps.overlap([{**RUNS[3], "copy_seconds": []}, resident]) is None
    table = gpu_steps.table(
        {
            "sizes": vars(gpu_steps.FULL),
            "parameters": 1.5e9,
            "rows": gpu_steps.compared(RUNS),
            "overlap": found,
        }
    )
    assert "| asft, resident | failed: the GPU's memory does not hold it |" in table
    assert "50% of the copy is hidden." in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


@pytest.mark.parametrize("steps", [gpu_steps.FULL, gpu_steps.LORA])
def test_the_law_of_the_real_shapes_is_the_planners(steps: gpu_steps.Steps) -> None:
    """What the bars will be on a GPU: operations of a step with and without the reference, from the planner, where every token is learned."""
    from asft_nemo.config.load import compose
    from asft_nemo.model.families import model_spec
    from asft_nemo.planner.flops import Computed, causal_pairs, step_flops
    from asft_nemo.planner.time import shape_of

    rows = steps.micro_batch_size * steps.micro_batches
    tokens = rows * steps.sequence_length
    computed = Computed(tokens, rows * causal_pairs([steps.sequence_length]), tokens)
    shape = shape_of(model_spec(gpu_steps.shape(steps, small=False)))
    check = argparse.Namespace(options=argparse.Namespace(precision="bf16"))

    def operations(form: str) -> float:
        given = gpu_steps.settings(steps, form, check, Path("x"), Path("y"))  # pyright: ignore[reportArgumentType]
        found = step_flops(compose(given, check_inputs=False), shape, computed)
        return found.policy + found.frozen

    laws = {form: operations(form) / operations(steps.against) for form in steps.forms}
    expected = {"cached": 1.05, "offloaded": 1.33, "resident": 1.33, "lora_adapter_disabled": 1.48}
    assert laws == pytest.approx({form: expected[form] for form in steps.forms}, abs=0.02)


def test_no_time_for_a_single_form_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(argparse.Namespace(prompt_share=0.0, precision="fp32"), "cpu", tmp_path, minutes=0.0)
    monkeypatch.setattr(Check, "alone", lambda self, call, **given: 7)
    monkeypatch.setattr(gpu_steps, "_train", lambda *given: {"seconds": [1.0]})
    with pytest.raises(SkipPart, match="has no room for two more"):
        gpu_steps.check_steps(gpu_steps.LORA, check)


def test_a_first_run_that_fails_is_the_parts_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(argparse.Namespace(prompt_share=0.0, precision="fp32"), "cpu", tmp_path)
    monkeypatch.setattr(Check, "alone", lambda self, call, **given: 7)

    def broken(*given: Any) -> Any:
        raise RankFailed("out of it")

    monkeypatch.setattr(gpu_steps, "_train", broken)
    with pytest.raises(RankFailed, match="out of it"):
        gpu_steps.check_steps(gpu_steps.LORA, check)


def test_runs_of_a_part_go_on_after_one_that_fails_until_the_time_is_up(tmp_path: Path) -> None:
    check = Check(argparse.Namespace(), "cpu", tmp_path, minutes=1.0)

    def broken() -> dict[str, Any]:
        raise RankFailed("rank 1: ValueError: x")

    def last() -> dict[str, Any]:
        check.minutes = 0.0
        raise RankFailed("not done in 5 s")

    works = {"broken": broken, "good": lambda: {"error": 1e-7}, "last": last, "later": broken}
    rows = gpu_cluster.attempts(works, check)
    assert rows == {
        "broken": {"failed": "rank 1: ValueError: x"},
        "good": {"error": 1e-7},
        "last": {"skipped": "--minutes was up"},
        "later": {"skipped": "--minutes was up"},
    }
    bars = gpu_cluster.bars_of(rows, "error", 1e-5)
    assert bars == {"failed": {"measured": 1, "limit": 0}, "error": {"measured": 1e-7, "limit": 1e-5}}
    assert gpu_cluster.bars_of({"broken": rows["broken"]}, "error", 1e-5)["error"] == {
        "reason": "rank 1: ValueError: x"
    }
    table = gpu_cluster.rows_table(rows, {"error": "error", "where": "largest in"}).splitlines()
    assert table[2:4] == ["| broken | failed: rank 1: ValueError: x | |", "| good | 1e-07 |  |"]


def test_all_ranks_have_a_layout() -> None:
    assert "tp2_pp2_vpp2_sp" not in gpu_cluster.fitting(gpu_cluster.LAYOUTS, 2)
    assert set(gpu_cluster.fitting(gpu_cluster.LAYOUTS, 8)) == set(gpu_cluster.LAYOUTS)
    for number in gpu_check.RANKS[1:]:
        found = gpu_cluster.fitting(gpu_cluster.LAYOUTS, number)
        assert {"tp2", "tp2_sp", "pp2", "dp"} <= set(found), "some parts ask for these by name"


def test_differences_of_steps() -> None:
    assert gpu_cluster.largest([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    assert gpu_cluster.largest([1.0], [1.0, 2.0]) == gpu_cluster.largest([], []) == float("inf")
