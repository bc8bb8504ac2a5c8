"""The benchmark of the losses: it compares the same loss, runs as a command, and judges its bars rightly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

from bench import contenders, measure, report  # noqa: E402

HERE = {"chunk_tokens": 24, "device": "cpu"}


def _case(objective: str, dtype: str) -> contenders.Case:
    return contenders.Case(tokens=32, vocab=96, hidden=16, dtype=dtype, objective=objective, **HERE)


@pytest.mark.parametrize("objective", ["asft", "sft_kl", "dft", "sft"])
def test_contenders_compute_the_same_gradients(objective: str) -> None:
    names = ["authors", "fused", "vocab_parallel"]
    errors = measure.gradient_errors(_case(objective, "fp32"), names)
    assert set(errors) == set(names)
    for name in names:
        assert errors[name]["objective"] == objective
        assert max(errors[name]["dhidden_TH"], errors[name]["dhead_VH"]) < 1e-5, name


def test_in_bf16_the_fused_loss_is_nearer_to_the_exact_gradient() -> None:
    errors = measure.gradient_errors(_case("asft", "bf16"), ["authors", "fused"])
    for what in ("dhidden_TH", "dhead_VH"):
        assert errors["fused"][what] < errors["authors"][what] / 2


@pytest.mark.slow
@pytest.mark.nemo
def test_modelopt_computes_the_same_gradients() -> None:
    pytest.importorskip("modelopt")
    errors = measure.gradient_errors(_case("asft", "fp32"), ["modelopt"])
    assert max(errors["modelopt"]["dhidden_TH"], errors["modelopt"]["dhead_VH"]) < 1e-5


def test_a_missing_library_is_skipped_with_the_reason() -> None:
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed here")
    answer = measure.time_rounds(_case("asft", "fp32"), ["authors", "liger"], repeats=1)
    assert answer["skipped"] == {"liger": "liger-kernel is not installed"}
    assert len(answer["seconds"]["authors"]) == 1


def test_peak_bytes_sees_an_allocation() -> None:
    size = 64 * 2**20
    with measure._peak_bytes("cpu") as result:
        torch.ones(size, dtype=torch.uint8)
    # Pages of program files that a machine short of memory took away meanwhile lower the mark.
    lost = max(-result.get("file_bytes_change", 0), 0)
    assert size <= result["bytes"] + lost + 4 * 2**20
    assert result["bytes"] < 2 * size or "ru_maxrss" in result["method"]


def _result(fused_seconds: float, fused_bytes: int) -> dict[str, object]:
    case = {"tokens": 4096, "vocab": 32768, "hidden": 512, "dtype": "fp32", "objective": "asft"}
    return {
        "case": case,
        "seconds": {"authors": [2.0, 4.0, 2.0], "fused": [fused_seconds, 2 * fused_seconds, fused_seconds]},
        "memory": {"authors": {"bytes": 800}, "fused": {"bytes": fused_bytes}},
    }


def test_bars_are_met_or_missed() -> None:
    met = {bar["quantity"]: bar for bar in report.verdicts([_result(1.7, 100)])}
    assert met["bytes"]["met"]
    assert met["bytes"]["ratio"] == 0.125
    assert met["seconds"]["met"]
    missed = report.verdicts([_result(1.72, 101)])
    assert [bar["met"] for bar in missed] == [False, False]
    assert report.verdicts([{**_result(1, 1), "case": {**met["bytes"]["case"], "tokens": 2048}}]) == []


def test_every_contender_has_a_title() -> None:
    assert set(report.TITLES) == set(contenders.CONTENDERS)


@pytest.mark.long
def test_the_command_writes_json_and_table(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(TOOLS / "bench_loss.py"),
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    command += ["--contenders", "authors", "fused", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "bench_loss.json").read_text())
    (result,) = written["results"]
    assert result["threads"] == 1
    assert result["case"]["tokens"] == 256
    assert len(result["seconds"]["fused"]) == 1
    assert result["memory"]["authors"]["bytes"] > 0
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert "fused_linear_loss" in (tmp_path / "bench_loss.md").read_text()
