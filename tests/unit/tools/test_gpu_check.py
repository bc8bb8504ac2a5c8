"""The GPU check where there is no GPU: its refusals, its tables, the settings it gives, its oracle on a CPU, and a rehearsal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from bench import gpu_form_tables, gpu_forms, layer_kinds, nemo_convert, outside_fp8  # noqa: E402
from bench.gpu_parts import Check  # noqa: E402
from bench.gpu_ranks import RankFailed, Ranks  # noqa: E402

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
        "gpu_check needs a CUDA GPU, and torch sees none here: run it on a machine that has one (docs/container.md), or rehearse with "
        "--device cpu"
    )
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_other_machines_that_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ASFT_DEVICE", raising=False)

    def refusal(*words: str) -> str | None:
        return gpu_check.refusal(gpu_check._parser().parse_args(["--out", "x", *words]))

    assert refusal("--gpus", "2", "--nproc", "2") is None
    assert "--gpus 3 asks for more than the 2 GPUs here" in str(refusal("--gpus", "3"))
    assert "--nproc 4 asks for more than the 2 GPUs here" in str(refusal("--nproc", "4"))
    for number in ("0", "3", "6", "16"):
        assert f"--nproc {number} is none of 1, 2, 4 and 8" in str(
            refusal("--nproc", number, "--device", "cpu")
        )
    assert refusal("--nproc", "8", "--device", "cpu") is None
    assert str(refusal("--parts", "loss", "lost")).startswith(
        "--parts lost is none of kernels, loss, steps_full,"
    )
    assert "--parts loss is none of collectives," in str(refusal("--parts", "loss", "--nproc", "2"))
    assert str(gpu_check.refusal(gpu_check._parser().parse_args([]))).startswith("--out is not given")
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert "unset it" in str(refusal())
    assert refusal("--device", "cpu") is None


def test_the_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list", "--parts", "loss"]) == 0
    assert capsys.readouterr().out == (
        "loss               about  2.0 min  The fused loss at T=8192, V=152064, H=5120\n"
    )


def test_ratios_are_to_sft_and_to_the_form_it_is_compared_with() -> None:
    lines = gpu_form_tables.memory_table(RUNS).splitlines()
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
    table = gpu_form_tables.memory_table({"resident": RUNS["resident"], "sft": {"failed": "no"}})
    assert "| asft, resident | 500.0 |  |  |" in table


def test_what_a_run_left_is_read(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary(7)))
    lines = [
        {"kl": 0.25, "seconds": 3.0, "loss": 2.0, "grad_norm": 4.0, "tokens_per_second": 5},
        {"kl": 0.5, "seconds": 1.5, "loss": 1.0, "grad_norm": 3.0, "tokens_per_second": 10},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert gpu_forms.found_in(tmp_path) == {
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
    bf16 = {"losses": [2.0] * 50, "loss_of_last_step": 2.0, "tokens_per_second": 100}
    own = {"losses": [2.0] * 49 + [loss], "loss_of_last_step": loss, "tokens_per_second": 150}
    runs = {"sft": bf16, "sft_fp8_current": own}
    assert gpu_form_tables.fp8_is_off("sft_fp8_current", runs) is off
    row = gpu_form_tables.precision_table(runs).splitlines()[-1]
    assert row.endswith("| 150 | 1.5000 | **off** |" if off else "| 150 | 1.5000 | right |")
    assert gpu_form_tables.fp8_is_off("sft_fp8_blockwise", runs) is None


def test_a_policy_in_fp8_that_did_not_run_says_why() -> None:
    table = gpu_form_tables.precision_table({"sft_fp8_delayed": {"skipped": "no Transformer Engine"}})
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


@pytest.mark.parametrize("form", list(gpu_forms.CHECKED))
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
    run = compose(gpu_forms.overrides(form, options, tmp_path, tmp_path / form), check_inputs=False)
    assert (run.run.world_size, run.parallel.pp_size) == (2, 1)
    assert run.precision == (form[form.index("fp8") :] if form in gpu_forms.PRECISIONS else "bf16")
    assert run.reference.precision == ("fp8" if form == "resident_fp8" else "policy")


def test_the_bars_of_the_forms() -> None:
    runs: dict[str, dict[str, Any]] = {
        "sft": {"losses": [2.0] * 50, "grad_norms": [4.0] * 50},
        "sft_local": {"losses": [2.002] * 50, "grad_norms": [4.2] * 50},
        "sft_fp8_current": {"losses": [2.1] * 50},
        "sft_fp8_delayed": {"skipped": "no Transformer Engine"},
        "resident_local": {"failed": "x"},
    }
    bars = gpu_form_tables.form_bars(runs)
    assert bars["loss_sft_fp8_current"] == {"measured": pytest.approx(0.05), "limit": 0.01}
    assert bars["loss_sft_fp8_delayed"] == {"reason": "no Transformer Engine"}
    assert bars["loss_sft_fp8_blockwise"] == {"reason": "one of the two runs is not there"}
    assert bars["loss_sft_local"] == {"measured": pytest.approx(0.001), "limit": 2**-8}
    assert bars["norm_sft_local"] == {"measured": pytest.approx(0.05), "limit": 2**-5}
    assert bars["norm_resident_local"] == {"reason": "x"}
    assert bars["failed"] == {"measured": 1, "limit": 0}


def test_all_of_the_forms_on_one_page() -> None:
    page = gpu_form_tables.forms_table({"runs": RUNS})
    assert gpu_form_tables.memory_table(RUNS) in page
    assert layer_kinds.table(RUNS) in page


def check_of(folder: Path, **given: Any) -> Check:
    return Check(gpu_check._parser().parse_args(["--out", str(folder)]), "cuda", folder, **given)


def test_one_broken_form_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(tmp_path)
    found = gpu_forms.measure("sft", check, tmp_path)  # there is no model in this folder
    assert found["failed"].startswith("ConfigError: ")
    assert "skipped" in gpu_forms.measure("resident_fp8", check, tmp_path)

    def hung(*given: Any, **more: Any) -> Any:
        raise RankFailed("x:y was not done in 900 s: rank 1 at training", "a log")

    monkeypatch.setattr(Ranks, "run", hung)
    failed = gpu_forms.attempt("sft", [], check, lambda: check.alone("x:y"))
    assert failed == {"failed": "x:y was not done in 900 s: rank 1 at training"}
    late = check_of(tmp_path, minutes=0.0)
    cut = gpu_forms.attempt("sft", [], late, lambda: late.alone("x:y"))
    assert cut == {"skipped": "--minutes was up: x:y was not done in 900 s: rank 1 at training"}


def test_forms_stop_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_forms, "model_folder", lambda check: tmp_path)
    monkeypatch.setattr(gpu_forms, "measure", lambda form, check, folder: {"failed": form})
    check = check_of(tmp_path, minutes=1.0)
    check.options.forms = ["resident", "resident_local"]
    left = iter([60.0, 20.0, 19.0, 18.0])
    monkeypatch.setattr(Check, "left", lambda self: next(left))
    found = gpu_forms.check_forms(check)
    assert found["runs"] == {
        "sft": {"failed": "sft"},
        "resident": {"skipped": "--minutes has no room for it"},
        "resident_local": {"skipped": "--minutes has no room for it"},
    }


def test_what_is_kept_of_no_run(tmp_path: Path) -> None:
    found = gpu_forms.check_kept(check_of(tmp_path))
    assert "profile" not in found["kept"]
    (tmp_path / "forms" / "resident_profiled").mkdir(parents=True)
    found = gpu_forms.check_kept(check_of(tmp_path))
    assert found["kept"]["profile"] == {"failed": "the profiled run left no page"}
    assert found["bars"]["failed"]["measured"] == 1
    assert "* profile: the profiled run left no page" in gpu_form_tables.kept_list(found)


def test_a_conversion_that_fails_or_hangs_is_a_row(tmp_path: Path) -> None:
    began = time.monotonic()
    hanging = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', '{tmp_path}'])"
    rows = [
        nemo_convert.row_of("asft import", [sys.executable, "-c", "pass"], seconds=60),
        nemo_convert.row_of("asft export", [sys.executable, "-c", "raise SystemExit(3)"], seconds=60),
        nemo_convert.row_of("NeMo import_ckpt", [sys.executable, "-c", hanging], seconds=1),
    ]
    assert time.monotonic() - began < 50
    assert rows[0]["seconds"] > 0
    assert rows[0]["peak_rss_bytes"] > 2**20
    assert [row.get("skipped") for row in rows] == [None, "ended with exit code 3", "not done in 1 s"]
    assert nemo_convert.bars(rows) == {"failed": {"measured": 1, "limit": 0}}, "NeMo's own are not ours"
    table = nemo_convert.table(rows).splitlines()
    assert table[3:] == [
        "| asft export | failed: ended with exit code 3 | |",
        "| NeMo import_ckpt | skipped: not done in 1 s | |",
    ]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and str(tmp_path) in commands():
        time.sleep(0.1)
    assert str(tmp_path) not in commands(), "what it had started ends with it"


def commands() -> str:
    """The command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return "\n".join(found)


def rehearsed(folder: Path, *words: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """The command on a CPU, in a folder far from the clone; `before` is run ahead of everything in all its processes."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(before)
    return subprocess.Popen(
        [sys.executable, TOOLS / "gpu_check.py", "--device", "cpu", "--out", folder / "out", *words],
        env={
            **os.environ,
            "PYTHONPATH": str(folder / "site"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **environment,
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_torch_one_sentence_and_code_2(tmp_path: Path) -> None:
    process = rehearsed(tmp_path, before="import sys\nsys.modules['torch'] = None\n")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert said == f"gpu_check needs torch, which {sys.executable} does not have: install it there\n"


def test_a_check_that_is_terminated_leaves_no_scratch(tmp_path: Path) -> None:
    """Slurm sends SIGTERM when a job's time is up; the models of a real check are tens of GB."""
    (tmp_path / "scratch").mkdir()
    process = rehearsed(tmp_path, "--parts", "kernels", TMPDIR=str(tmp_path / "scratch"))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "scratch").glob("asft-gpu-ranks-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list((tmp_path / "scratch").glob("asft-gpu-check-*"))
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list((tmp_path / "scratch").glob("asft-*"))


def test_a_rehearsal_where_only_torch_is_installed(tmp_path: Path) -> None:
    """The command itself, in an environment without the training stack: what can run does, the rest says what is missing."""
    names = ("nemo", "megatron", "hydra", "omegaconf", "modelopt", "lightning", "transformers", "psutil")
    process = rehearsed(
        tmp_path,
        *("--parts", "kernels", "steps_lora", "forms"),
        before=f"import sys\nfor name in {names}:\n    sys.modules[name] = None\n",
    )
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, said
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {name: one["status"] for name, one in record["parts"].items()} == {
        "kernels": "done",
        "steps_lora": "skipped",
        "forms": "skipped",
    }
    assert record["parts"]["steps_lora"]["reason"].startswith(
        "the training stack is not installed here (nemo, "
    )
    assert {row["verdict"] for row in record["bars"]} == {"unmeasured"}
    assert "no GPU: a rehearsal on the CPU" in (tmp_path / "out" / "gpu_check.md").read_text()
