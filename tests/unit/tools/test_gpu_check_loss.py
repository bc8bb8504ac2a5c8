"""The GPU check's parts about the loss, at small sizes on a CPU: the oracle, what is timed, and how it is judged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from bench import contenders, gpu_clock, gpu_loss, truth
from bench.contenders import Case
from bench.gpu_parts import Check


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(truth.OBJECTIVES))
def test_the_loss_is_right_on_a_cpu_too(name: str, dtype: str) -> None:
    case = Case(96, 160, 32, dtype, objective="asft", chunk_tokens=29, device="cpu")
    found = truth.check(name, case, triton=False)
    assert found.right, found
    assert found.skipped is None
    assert 0 < found.dhidden <= max(2 * found.naive_dhidden, truth.GRADIENT_BOUNDS[dtype])
    skipped = truth.check(name, case, triton=True)
    assert skipped.skipped == "Triton's kernels do not run on this device"


def test_a_loss_that_is_off_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(96, 160, 32, "fp32", objective="asft", chunk_tokens=29, device="cpu")
    true_loss = truth.fused_linear_loss
    other = truth.objective("asft", kl_weight=1.001 * truth.KL_WEIGHT)
    monkeypatch.setattr(
        truth, "fused_linear_loss", lambda *args, **given: true_loss(*args, **{**given, "objective": other})
    )
    found = truth.check("asft, forward KL", case, triton=False)
    assert not found.right
    rows = [found.record(), truth.Check("sft", "bf16", True, skipped="why").record()]
    table = gpu_loss.truth_table({"truth": rows}).splitlines()[3:]
    assert table[2].endswith("| **off** |")
    assert table[3].endswith("| skipped: why |")
    assert len({line.count("|") for line in table}) == 1


CASE = {**gpu_loss.SMALL, "dtype": "bf16", "objective": "asft", "chunk_tokens": "auto", "device": "cpu"}


def test_the_loss_part_on_a_cpu() -> None:
    """Every row runs or says why not; errors are those of a small size, where ours is the nearer to fp64."""
    names = [
        name for name in gpu_loss.TITLES if name != "modelopt"
    ]  # it takes ten seconds to import; tests of bench_loss have it
    found: dict[str, Any] = {
        "case": CASE,
        **gpu_loss.times(CASE, 3, names),
        "memory": gpu_loss.memory(CASE, names),
    }
    found["errors"] = gpu_loss.errors(CASE, rows=40)
    assert set(found["seconds"]) | set(found["skipped"]) == set(names)
    assert {"gemms", "fused", "fused_returned", "authors"} <= set(found["seconds"])
    assert all(len(one) == 3 and min(one) > 0 for one in found["seconds"].values())
    bars = gpu_loss.loss_bars(found)
    assert bars["memory"] == {"reason": "no allocator to ask"}
    for what in ("loss_error", "dhidden_error", "dhead_error"):
        assert 0 < bars[what]["measured"] < bars[what]["limit"] / 2, what
    table = gpu_loss.loss_table(found)
    assert f"| {gpu_loss.TITLES['fused_pytorch']} | on a CPU there is nothing but PyTorch |  |  |" in table


@pytest.mark.parametrize("broken", ["build", "visit"])
def test_another_library_that_breaks_costs_its_own_row_and_ours_the_part(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Case) -> Any:
        if broken == "build":
            raise TypeError("an argument that a later version has no more\nmore")
        return lambda tensors: {}["no such kernel"]

    rows = {**gpu_loss.CONTENDERS, "liger": contenders.Contender(build)}
    monkeypatch.setattr(gpu_loss, "CONTENDERS", rows)
    names = ["gemms", "liger", "authors"]
    found, held = gpu_loss.times(CASE, 1, names), gpu_loss.memory(CASE, names)
    said = {
        "build": "TypeError: an argument that a later version has no more",
        "visit": "KeyError: 'no such kernel'",
    }
    assert found["skipped"] == {"liger": said[broken]}
    assert set(found["seconds"]) == {"gemms", "authors"}
    assert held["liger"] == {"skipped": said[broken]}
    monkeypatch.setattr(gpu_loss, "CONTENDERS", {**rows, "fused": rows["liger"]})
    for work in (
        lambda: gpu_loss.times(CASE, 1, ["fused_returned"]),
        lambda: gpu_loss.memory(CASE, ["fused_returned"]),
    ):
        with pytest.raises((TypeError, KeyError)):
            work()


def test_errors_in_pieces_are_those_in_one() -> None:
    whole, pieces = (gpu_loss.errors(CASE, rows=rows) for rows in (1000, 17))
    assert pieces == {name: pytest.approx(row, rel=1e-6) for name, row in whole.items()}


def test_the_gradient_that_training_adds_up_is_the_losses() -> None:
    """What is timed as ours does compute dHead: into the buffer, as it does for `main_grad`."""
    tensors = gpu_loss.make_tensors(Case(**{**CASE, "dtype": "fp32"}))
    case = Case(**{**CASE, "dtype": "fp32"})
    buffer = gpu_loss._main_grad(tensors)
    gpu_loss._as_training(case, tensors, buffer)()
    assert tensors.head_VH.grad is None
    gpu_loss._contender("authors", case, tensors)()
    assert tensors.head_VH.grad is not None
    torch.testing.assert_close(buffer / case.tokens, tensors.head_VH.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("ratio", "memory", "passed"), [(1.5, 0.12, True), (1.7, 0.13, False)])
def test_the_bars_of_the_loss(ratio: float, memory: float, passed: bool) -> None:
    errors = {"loss": 1e-6, "dhidden": 1e-3, "dhead": 1e-3}
    found = {
        "seconds": {"gemms": [2.0, 4.0, 8.0], "fused": [2 * ratio, 4 * ratio, 8 * ratio]},
        "memory": {"fused": {"bytes": 1000 * memory}, "authors": {"bytes": 1000}},
        "errors": {"fused": errors, "authors": {key: 2 * value for key, value in errors.items()}},
    }
    bars = gpu_loss.loss_bars(found)
    for name in ("time", "memory"):
        assert (bars[name]["measured"] <= bars[name]["limit"]) is passed, name
    naive_full = {**found, "memory": {"fused": {"bytes": 1}, "authors": {"skipped": "too large"}}}
    assert gpu_loss.loss_bars(naive_full)["memory"] == {"reason": "too large"}


def test_kernels_that_do_not_run_are_not_called_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = gpu_loss.kernels(**{**gpu_loss.SMALL, "tokens": 24}, device="cpu")
    monkeypatch.setattr(Check, "alone", lambda self, call, **given: rows)
    found = gpu_loss.check_kernels(Check(argparse.Namespace(tokens=8, vocab=8), "cuda", tmp_path))
    assert found["bars"]["wrong"] == {"reason": "Triton's kernels do not run on this device"}
    for row in rows:
        row["skipped"] = None
    rows[1]["right"] = False
    assert gpu_loss.check_kernels(Check(argparse.Namespace(tokens=8, vocab=8), "cuda", tmp_path))["bars"][
        "wrong"
    ] == {"measured": 1, "limit": 0}


class FakeEvent:
    """A CUDA event of a device on which each is 0.25 s after the one before."""

    now = 0.0

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 0.25
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_laps_on_a_gpu_are_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("waited"))
    watch = gpu_clock.Stopwatch("cuda")
    for _ in range(2):
        watch.start()
        watch.stop()
    assert waits == [], "measuring waits for nothing"
    assert watch.seconds() == [0.25, 0.25]
    assert waits == ["waited"]


def test_memory_on_a_gpu_is_the_peak_above_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 170}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: told.append(name))
    with gpu_clock.peak_above("cuda") as peak:
        told.append("work")
    assert peak == {"bytes": 70}
    assert (
        told.index("reset_peak_memory_stats")
        < told.index("work")
        < len(told) - 1 - told[::-1].index("synchronize")
    )
