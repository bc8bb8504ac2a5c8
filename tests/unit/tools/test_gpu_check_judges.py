"""What the GPU check must not overlook: figures that are no numbers, fp32 that is rounded to TF32, a loss that is judged too early."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from bench import compared, gpu_cluster, gpu_form_tables, gpu_forms, gpu_loss, gpu_table, layer_kinds
from bench.gpu_parts import Check, verdicts
from bench.gpu_ranks import Ranks

NAN, INF = math.nan, math.inf
ANYWHERE = {part.name: part for part in (*gpu_table.ONE_GPU, *gpu_table.SEVERAL)}


def verdict(part: str, found: dict[str, Any], what: str) -> dict[str, Any]:
    """Of the bar of this part that says `what`."""
    rows = verdicts([ANYWHERE[part]], {part: {"found": found}}, device="cuda")
    return next(row for row in rows if row["what"] == what)


@pytest.mark.parametrize("order", [("tp2", "pp2"), ("pp2", "tp2")])
@pytest.mark.parametrize("other", [NAN, INF])
def test_a_row_that_is_no_number_is_missed_wherever_it_stands(order: tuple[str, ...], other: float) -> None:
    figures = {"tp2": 0.9, "pp2": other}
    rows = {name: {"of_plain": figures[name]} for name in order}
    bars = gpu_cluster.bars_of(rows, "of_plain", gpu_cluster.OF_PLAIN)
    said = "error over plain PyTorch's in bf16"
    for part in ("gradients_bf16", "context_ring"):
        assert verdict(part, {"bars": bars}, said)["verdict"] == "missed"
    good = gpu_cluster.bars_of({"tp2": {"of_plain": 0.9}}, "of_plain", gpu_cluster.OF_PLAIN)
    assert verdict("context_ring", {"bars": good}, said)["verdict"] == "passed"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_that_is_no_number_is_not_passed_over(step: int) -> None:
    own, other = [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]
    assert compared.largest(own, other) == 0.0
    own[step] = NAN
    assert math.isnan(compared.largest(own, other))
    assert math.isnan(compared.largest(other, own))
    own[step] = INF
    assert compared.largest(own, other) == INF
    assert not compared.largest(other, own) <= 1.0, "a finite number over an infinite one is none"


def test_layers_of_both_kinds_are_off_where_a_norm_is_no_number() -> None:
    good = {"losses": [2.0, 1.0], "grad_norms": [4.0, 3.0]}
    for norms in ([NAN, 3.0], [4.0, NAN]):
        runs = {"sft": good, "sft_local": {**good, "grad_norms": norms}}
        assert layer_kinds.is_off("sft_local", runs) is True
        said = "gradient norms of sft, kernels.layers=local off Transformer Engine's"
        assert verdict("forms", {"bars": gpu_form_tables.form_bars(runs)}, said)["verdict"] == "missed"


def test_the_worst_of_nothing_is_missed() -> None:
    assert compared.worst([]) == compared.largest([], []) == INF
    assert compared.worst([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(compared.worst([INF, NAN]))


ASKED = {  # job -> what it answers here
    "times": {"seconds": {}, "skipped": {"fused": "x"}, "chunk_tokens": 1},
    "memory": {"fused": {"skipped": "x"}, "authors": {"skipped": "x"}},
    "errors": {"fused": {}, "authors": {}},
    "kernels": [],
}


def test_no_process_that_is_held_against_fp64_rounds_to_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's containers set the second variable to 1."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    got: dict[str, dict[str, str]] = {}

    def run(self: Ranks, call: str, **given: Any) -> list[Any]:
        self._store = argparse.Namespace(port=1)
        job = call.partition(":")[2]
        got[job] = self._environment_of(0)
        return [ASKED[job]]

    monkeypatch.setattr(Ranks, "run", run)
    check = Check(argparse.Namespace(tokens=8, vocab=8), "cuda", tmp_path)
    gpu_loss.check_kernels(check)
    gpu_loss.check_loss(check)
    assert set(got) == set(ASKED)
    for environment in got.values():
        assert environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
        assert environment["NVIDIA_TF32_OVERRIDE"] == "0"


def test_a_job_of_its_own_gets_the_environment_that_it_is_given(tmp_path: Path) -> None:
    check = Check(argparse.Namespace(), "cpu", tmp_path)
    for value in ("0", "1"):
        given = {"NVIDIA_TF32_OVERRIDE": value}
        assert check.alone("os:getenv", timeout=60, environment=given, key="NVIDIA_TF32_OVERRIDE") == value


def runs_of(steps: int, *, fp8: float, others: int | None = None) -> dict[str, dict[str, Any]]:
    """sft in bf16 that ends at a loss of 2, and in FP8."""
    return {
        name: {"losses": [3.0] * (number - 1) + [loss], "loss_of_last_step": loss, "tokens_per_second": 100}
        for name, loss, number in (("sft", 2.0, others or steps), ("sft_fp8_current", fp8, steps))
    }


@pytest.mark.parametrize(
    ("runs", "judged"),
    [
        (runs_of(50, fp8=2.01), "passed"),
        (runs_of(50, fp8=2.1), "missed"),
        (runs_of(50, fp8=NAN), "missed"),
        (runs_of(49, fp8=2.01), "unmeasured"),
        (runs_of(4, fp8=2.1), "unmeasured"),
        (runs_of(50, fp8=2.1, others=4), "unmeasured"),
    ],
)
def test_a_loss_in_fp8_is_judged_after_fifty_steps(runs: dict[str, dict[str, Any]], judged: str) -> None:
    bars = gpu_form_tables.form_bars(runs)
    row = verdict("forms", {"bars": bars}, "loss of sft, precision=fp8_current off bf16's")
    assert row["verdict"] == judged
    table = gpu_form_tables.precision_table(runs).splitlines()[-1]
    if judged == "unmeasured":
        assert row["reason"] == "fewer than 50 steps"
        assert table.endswith("| fewer than 50 steps |")
    else:
        assert table.endswith("| right |" if judged == "passed" else "| **off** |")
    assert bars["loss_sft_fp8_delayed"]["reason"] == "one of the two runs is not there"


def test_a_loss_that_was_not_finite_is_no_number(tmp_path: Path) -> None:
    """metrics.jsonl has null for it; the other runs are judged all the same."""
    (tmp_path / "summary.json").write_text("{}")
    line = {"kl": None, "seconds": 1.0, "loss": 3.0, "grad_norm": 4.0, "tokens_per_second": 5}
    lines = [*[line] * 49, {**line, "loss": None, "grad_norm": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = gpu_forms.found_in(tmp_path)
    assert found["losses"][:-1] == [3.0] * 49
    runs = {**runs_of(50, fp8=2.0), "sft_fp8_current": found}
    said = "loss of sft, precision=fp8_current off bf16's"
    assert verdict("forms", {"bars": gpu_form_tables.form_bars(runs)}, said)["verdict"] == "missed"
    assert gpu_form_tables.precision_table(runs).endswith("| **off** |")


def test_fp8_at_two_ranks_trains_as_long_as_its_bar_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def losses(check: Check, group: Any, model: Path, name: str, settings: dict[str, Any]) -> list[float]:
        asked.append(settings["trainer.max_steps"])
        return [2.0, 4.0]

    monkeypatch.setattr(gpu_cluster, "tests_at_hand", lambda: argparse.Namespace(OBJECTIVES={"sft": {}}))
    monkeypatch.setattr(gpu_cluster, "_model", lambda check, name, **sizes: tmp_path)
    monkeypatch.setattr(gpu_cluster, "_losses", losses)
    monkeypatch.setattr(gpu_cluster, "lacks", lambda settings: None)
    found = gpu_cluster.check_fp8(Check(argparse.Namespace(), "cpu", tmp_path, nproc=2))
    assert asked == [50, 50, 50]
    assert found["bars"]["difference"] == {"measured": 0.0, "limit": 0.01}
    assert {
        bar.bound for name in ("fp8_tp2", "forms") for bar in ANYWHERE[name].bars if "off bf16's" in bar.what
    } == {"1 % after 50 steps or more"}
