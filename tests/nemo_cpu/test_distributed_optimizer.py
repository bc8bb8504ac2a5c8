"""Megatron's distributed optimizer with its overlaps: the same training as without it, for every kind of frozen model, and bit-exact resumes.

The reference of `reference=adapter_disabled` runs on the policy's own layers, and psft's snapshot copies them, while their parameters
may still be on their way from other ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kept import some_of
from ranks import RankGroup
from real_runs import VALID, all_tensors, metrics, settings_of, without_times

from asft_nemo.checkpoint import export_hf

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

OVERLAPPED = {
    "optim.distributed": True,
    "optim.overlap_grad_reduce": True,
    "optim.overlap_param_gather": True,
}
KEPT = {"trainer.checkpoint_every": 2, "trainer.keep": "last:2"}
TP2_DP2 = {"parallel.pp_size": 1}
PP2_DP2 = {"parallel.tp_size": 1}
LORA = {"peft.name": "lora", "peft.dropout": 0.1, "reference.form": "adapter_disabled"}
PSFT = {"objective.name": "psft", "objective.refresh_every": 2, "reference.form": "none"}

# name -> (tied or untied, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resident_tp2_dp2": ("untied", TP2_DP2),
    "resident_tp2_dp2_sp_bf16": (
        "untied",
        {**TP2_DP2, "parallel.sequence_parallel": True, "precision": "bf16"},
    ),
    "resident_pp2_dp2": ("tied", PP2_DP2),
    "resident_pp2_vpp2_dp2": ("untied", {**PP2_DP2, "parallel.vpp_size": 2}),
    "lora_tp2_dp2": ("untied", {**TP2_DP2, **LORA}),
    "lora_pp2_vpp2_dp2": ("tied", {**PP2_DP2, **LORA, "parallel.vpp_size": 2}),
    "psft_tp2_dp2": ("untied", {**TP2_DP2, **PSFT}),
}


def settings_for(models: dict[str, Path], folder: Path, case: str) -> dict[str, Any]:
    weights, more = CASES[case]
    # The norm is summed in another order over shards; a bound that is never reached keeps its last bits out of the weights.
    return {
        **settings_of(models[weights], folder, trainer__max_steps=4, optim__clip_grad=1e6),
        **more,
    }


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    tensors = all_tensors(run / "checkpoints" / "latest")
    return {key: value for key, value in tensors.items() if key.startswith("module.")}


@pytest.mark.parametrize(
    "case", some_of(CASES, kept=["resident_pp2_vpp2_dp2", "lora_tp2_dp2", "psft_tp2_dp2"])
)
def test_training_is_that_of_the_ordinary_optimizer(
    case: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Four steps, with a validation after the second: losses, divergences and weights are equal bit for bit."""
    runs = {"ordinary": {}, "overlapped": OVERLAPPED}
    for name, switches in runs.items():
        settings = {**settings_for(models, tmp_path / name, case), **switches, "trainer.validate_every": 2}
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID, validation=8)
    lines = [without_times(metrics(tmp_path / name)) for name in runs]
    for ordinary, overlapped in zip(*lines, strict=True):
        assert overlapped.pop("grad_norm") == pytest.approx(ordinary.pop("grad_norm"), rel=1e-5)
        assert overlapped == ordinary
    one, other = (weights_of(tmp_path / name) for name in runs)
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    if not case.startswith("lora"):
        for name in runs:
            export_hf(tmp_path / name / "checkpoints" / "latest", tmp_path / f"{name}_hf")
        files = [(tmp_path / f"{name}_hf" / "model.safetensors").read_bytes() for name in runs]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    "case",
    some_of(
        ["resident_tp2_dp2_sp_bf16", "resident_pp2_vpp2_dp2", "lora_tp2_dp2"],
        kept=["resident_tp2_dp2_sp_bf16"],
    ),
)
def test_resume_is_bit_exact(case: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path) -> None:
    """4 steps straight equal the same run gone on with from its second step's checkpoint: metrics, weights, optimizer state."""
    settings = {**settings_for(models, tmp_path / "run", case), **KEPT, **OVERLAPPED}
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    straight = metrics(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_4").rename(tmp_path / "straight")
    back_to_step_2(folder)
    ranks4.run("jobs:train_steps", settings={**settings, "trainer.resume": "must"}, valid=VALID)
    assert without_times(metrics(tmp_path / "run")) == without_times(straight)
    one, other = (all_tensors(checkpoint) for checkpoint in (tmp_path / "straight", folder / "step_4"))
    assert set(one) == set(other)
    assert [key for key in one if key.startswith("optimizer")]
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def back_to_step_2(checkpoints: Path) -> None:
    """As if the run had been killed after its second step."""
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_2")


@pytest.mark.long
def test_resume_at_another_layout_goes_on(ranks4: RankGroup, models: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint of TP2 x DP2 continues at DP4 and at PP2 x DP2: the next steps' losses agree to rounding."""
    settings = {**settings_for(models, tmp_path / "run", "resident_tp2_dp2"), **KEPT, **OVERLAPPED}
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    expected = [line["loss"] for line in metrics(tmp_path / "run")]
    for layout in ({"parallel.tp_size": 1}, {"parallel.tp_size": 1, "parallel.pp_size": 2}):
        back_to_step_2(tmp_path / "run" / "checkpoints")
        ranks4.run("jobs:train_steps", settings={**settings, **layout, "trainer.resume": "must"}, valid=VALID)
        assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
