"""The GPU check where there is no GPU: its refusal, its tables, the settings it gives, and its oracle on a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from bench import layer_kinds, outside_fp8, truth  # noqa: E402
from bench.contenders import Case  # noqa: E402

from asft_nemo.config.load import compose  # noqa: E402


def summary(peak: int, *, device: int = 0) -> dict[str, int]:
    return {
        "peak_device_bytes": peak,
        "policy_parameter_bytes": 2**21,
        "reference_device_bytes": device,
        "reference_host_bytes": 0,
        "reference_disk_bytes": 0,
        "reference_hidden_bytes": 2**20,
        "peak_rss_bytes": 1,
    }


RUNS: dict[str, dict[str, Any]] = {
    "sft": {"summary": summary(400 * 2**20), "kl_at_step_0": None, "seconds_of_last_step": 1.0},
    "resident": {
        "summary": summary(500 * 2**20, device=2**21),
        "kl_at_step_0": 0.0,
        "seconds_of_last_step": 1.0,
    },
    "offloaded": {"failed": "RuntimeError: the training ranks | stopped\nwith more"},
    "lora_sft": {"summary": summary(100 * 2**20), "kl_at_step_0": None, "seconds_of_last_step": 1.0},
    "lora_adapter_disabled": {
        "summary": summary(110 * 2**20),
        "kl_at_step_0": 2.5e-3,
        "seconds_of_last_step": 1.0,
    },
    "resident_fp8": {"skipped": "no Transformer Engine"},
}


WEIGHT = {"class": "torch.nn.parameter.Parameter", "dtype": "torch.bfloat16"}
OUTSIDE: dict[str, Any] = {"tensors": {"weight of the head": WEIGHT}, "layers_in_fp8": [False, True]}


def test_without_a_gpu_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASFT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == (
        "gpu_check needs a CUDA GPU, and torch sees none here: run it on a machine that has one (docs/container.md)"
    )
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_other_machines_that_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ASFT_DEVICE", raising=False)
    assert gpu_check.refusal(2) is None
    assert "--gpus 3 asks for more than the 2 GPUs here" in str(gpu_check.refusal(3))
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert "unset it" in str(gpu_check.refusal(1))


def test_ratios_are_to_sft_and_to_the_form_it_is_compared_with() -> None:
    lines = gpu_check.memory_table(RUNS).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1, "every row has as many cells as the head"
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert cells["sft"][:3] == ["400.0", "1.000", "1.000"]
    assert cells["asft, resident"] == [
        "500.0",
        "1.250",
        "1.250",
        "2.0",
        "2.0",
        "0.0",
        "0.0",
        "1.0",
        "0.00e+00",
    ]
    assert cells["LoRA asft, adapters disabled"][:3] == ["110.0", "0.275", "1.100"]
    assert cells["LoRA asft, adapters disabled"][-1] == "2.50e-03"
    assert cells["asft, offloaded"][0] == "failed: RuntimeError: the training ranks / stopped"
    assert cells["asft, resident in FP8"][0] == "no Transformer Engine"


def test_without_the_measure_there_is_no_ratio() -> None:
    table = gpu_check.memory_table({"resident": RUNS["resident"], "sft": {"failed": "no"}})
    assert "| asft, resident | 500.0 |  |  |" in table


def test_what_a_run_left_is_read(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary(7)))
    lines = [
        {"kl": 0.25, "seconds": 3.0, "loss": 2.0, "grad_norm": 4.0, "tokens_per_second": 5},
        {"kl": 0.5, "seconds": 1.5, "loss": 1.0, "grad_norm": 3.0, "tokens_per_second": 10},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert gpu_check.found_in(tmp_path) == {
        "summary": summary(7),
        "kl_at_step_0": 0.25,
        "seconds_of_last_step": 1.5,
        "loss_of_last_step": 1.0,
        "tokens_per_second": 10,
        "losses": [2.0, 1.0],
        "grad_norms": [4.0, 3.0],
    }


@pytest.mark.parametrize(("loss", "off"), [(2.0, False), (2.019, False), (1.979, True), (float("nan"), True)])
def test_a_policy_in_fp8_must_end_where_bf16_does(loss: float, off: bool) -> None:
    bf16 = {"loss_of_last_step": 2.0, "tokens_per_second": 100}
    runs = {"sft": bf16, "sft_fp8_current": {"loss_of_last_step": loss, "tokens_per_second": 150}}
    assert gpu_check.fp8_is_off("sft_fp8_current", runs) is off
    row = gpu_check.precision_table(runs).splitlines()[-1]
    assert row.endswith("| 150 | 1.5000 | **off** |" if off else "| 150 | 1.5000 | right |")
    assert gpu_check.fp8_is_off("sft_fp8_blockwise", runs) is None


def test_a_policy_in_fp8_that_did_not_run_says_why() -> None:
    table = gpu_check.precision_table({"sft_fp8_delayed": {"skipped": "no Transformer Engine"}})
    assert table.splitlines()[-1] == "| sft, precision=fp8_delayed |  |  |  |  | no Transformer Engine |"


@pytest.mark.parametrize(
    ("losses", "norms", "off"),
    [
        ([2.0, 1.0], [4.0, 3.0], False),
        ([2.0, 1.003], [4.0, 3.05], False),
        ([2.0, 1.005], [4.0, 3.0], True),
        ([2.0, 1.0], [4.0, 3.1], True),
        ([2.0, float("nan")], [4.0, 3.0], True),
        ([2.0], [4.0], True),
    ],
)
def test_layers_of_both_kinds_must_agree_at_every_step(
    losses: list[float], norms: list[float], off: bool
) -> None:
    runs = {
        "sft": {"losses": [2.0, 1.0], "grad_norms": [4.0, 3.0]},
        "sft_local": {"losses": losses, "grad_norms": norms},
        "resident_local": {"skipped": "no Transformer Engine to compare with"},
    }
    assert layer_kinds.is_off("sft_local", runs) is off
    assert layer_kinds.is_off("resident_local", runs) is None
    table = layer_kinds.table(runs).splitlines()
    assert table[2].endswith("| **off** |" if off else "| right |")
    assert table[3].endswith("|  |  | no Transformer Engine to compare with |")


@pytest.mark.parametrize(
    ("change", "off"),
    [
        ({}, False),
        ({"layers_in_fp8": [False, False]}, True),  # then nothing was shown
        ({"tensors": {"x": {**WEIGHT, "class": "transformer_engine.pytorch.tensor.Float8Tensor"}}}, True),
        ({"tensors": {"x": {**WEIGHT, "dtype": "torch.float8_e4m3fn"}}}, True),
        ({"tensors": {}}, True),
    ],
)
def test_what_must_be_outside_fp8(change: dict[str, Any], off: bool) -> None:
    found = {**OUTSIDE, **change}
    assert outside_fp8.is_off(found) is off
    assert ("**off**" in outside_fp8.table({"fp8_current": found})) is off


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("runs", {"resident": {"failed": "x"}}),
        ("outside", {"fp8_current": {**OUTSIDE, "layers_in_fp8": []}}),
        ("kept", {"profile": {"failed": "the profiled run left no page"}}),
        ("truth", None),
    ],
)
def test_anything_wrong_is_the_exit_code(part: str, change: dict[str, Any] | None) -> None:
    right = {"runs": {"sft": RUNS["sft"]}, "outside": {"fp8_current": OUTSIDE}, "kept": {}, "truth": []}
    assert not gpu_check.anything_wrong(right)
    assert gpu_check.anything_wrong({**right, part: [{"right": False}] if change is None else change})


@pytest.mark.parametrize("form", list(gpu_check.CHECKED))
def test_settings_of_every_form_pass_the_rules(form: str, tmp_path: Path) -> None:
    options = gpu_check._parser().parse_args(["--out", str(tmp_path), "--gpus", "2"])
    (tmp_path / "model" / "nemo").mkdir(parents=True)
    shape = {
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "num_attention_heads": options.hidden // 64,
        "intermediate_size": 4 * options.hidden,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "model" / "nemo" / "config.json").write_text(json.dumps(shape))
    run = compose(gpu_check.overrides(form, options, tmp_path, tmp_path / form), check_inputs=False)
    assert (run.run.world_size, run.parallel.pp_size) == (2, 1)
    assert run.precision == (form[form.index("fp8") :] if form in gpu_check.PRECISIONS else "bf16")
    assert run.reference.precision == ("fp8" if form == "resident_fp8" else "policy")


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
    table = gpu_check.truth_table([found.record(), truth.Check("sft", "bf16", True, skipped="why").record()])
    assert table.splitlines()[2].endswith("| **off** |")
    assert table.splitlines()[3].endswith("| skipped: why |")
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_page_says_what_it_was_measured_on() -> None:
    record = {
        "date": "2026-01-02",
        "machine": {"gpus": ["A GPU, 80 GiB"], "cuda": "12.9"},
        "versions": {"torch": "2.13.0", "apex": None},
        "commit": "abc",
        "options": {"hidden": 64, "forms": ["sft"]},
        "runs": RUNS,
        "truth": [],
        "outside": {"fp8_current": OUTSIDE, "fp8_blockwise": {"skipped": "no GPU"}},
        "kept": {"profile": {"kept": "runs/gpu_check_profile"}},
        "conversion": [
            {"what": "asft import", "seconds": 2.0, "peak_rss_bytes": 3 << 20},
            {"what": "NeMo", "skipped": "why"},
        ],
    }
    page = gpu_check.page(record)
    assert "A GPU, 80 GiB; CUDA 12.9. torch 2.13.0. Commit abc." in page
    assert "Options: hidden=64." in page
    assert gpu_check.memory_table(RUNS) in page
    assert "| asft import | 2.0 | 3 |" in page
    assert "| NeMo | skipped: why | |" in page


def test_one_broken_form_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = argparse.Namespace(**vars(gpu_check._parser().parse_args(["--out", str(tmp_path)])))
    found = gpu_check.measure("sft", options, tmp_path)  # there is no model in this folder
    assert found["failed"].startswith("ConfigError: ")
    assert "skipped" in gpu_check.measure("resident_fp8", options, tmp_path)
