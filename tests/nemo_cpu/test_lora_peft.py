"""Adapters trained on real ranks leave as a merged model and as a PEFT directory, and go on training from the latter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import LENGTH, second_batch
from jobs import RandomTokens
from models import load64, oracle_gradients
from ranks import RankGroup
from real_runs import VALID, metrics, without_times
from test_lora import adapters_in, lora, same_checkpoints

from asft_nemo.checkpoint.lora_merge import export_merged
from asft_nemo.checkpoint.lora_peft import export_peft
from asft_nemo.objectives import objective
from asft_nemo.run_dir import point_at

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

DATA = RandomTokens(size=64, sequence_length=LENGTH, valid=[32])


def logits(network: Any) -> torch.Tensor:
    """Of examples 0 to 3 [4, S, V], as `jobs.megatron_logits` computes them."""
    with torch.no_grad():
        return network(input_ids=torch.stack([DATA[i]["tokens"] for i in range(4)])).logits


@pytest.fixture(scope="module")
def trained(ranks4: RankGroup, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of adapters after two large steps at TP2 x PP2, and the PEFT directory made of it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = lora(model, folder / "run", trainer__max_steps=2, optim__lr=3e-2)
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    checkpoint = folder / "run" / "checkpoints" / "latest"
    export_peft(checkpoint, folder / "peft")
    return checkpoint, folder / "peft"


def test_merged_peft_and_megatron_compute_the_same_and_training_goes_on(
    ranks4: RankGroup, model: Path, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Logits of four programs; the first KL is logged and not limited; the reference stays the bare base; a resume needs no PEFT directory."""
    from peft import PeftModel

    checkpoint, peft_dir = trained
    export_merged(checkpoint, tmp_path / "merged")
    exact, base = logits(load64(tmp_path / "merged")), logits(load64(model))
    in_peft = logits(PeftModel.from_pretrained(load64(model), peft_dir))
    shutil.copytree(peft_dir, tmp_path / "given")
    going_on = {
        "peft__adapter": str(tmp_path / "given"),
        "peft__dropout": 0.0,
        "trainer__max_steps": 2,
        "trainer__checkpoint_every": 1,
        "trainer__keep": "last:2",
        "parallel__tp_size": 1,
        "parallel__vpp_size": 2,  # another layout: PP2 x DP2 in two virtual stages
    }
    settings = lora(model, tmp_path / "run", **going_on)
    ranks4.run("jobs:megatron_logits", settings=settings, out=str(tmp_path / "logits.pt"))
    in_megatron = torch.load(tmp_path / "logits.pt").double()
    errors = {
        name: float((found - exact).abs().max() / exact.abs().max())
        for name, found in (("PEFT", in_peft), ("Megatron", in_megatron), ("bare base", base))
    }
    print(f"logits against the merged model in fp64: {errors}")
    assert errors["PEFT"] <= 1e-5
    assert errors["Megatron"] <= 1e-5
    assert errors["bare base"] > 0.05

    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] > 0.01  # which reference.max_initial_kl refuses elsewhere
    steps = tmp_path / "run" / "checkpoints"
    export_merged(steps / "step_1", tmp_path / "step_1")
    anchored = objective("asft", kl_weight=0.1)
    _, loss = oracle_gradients(tmp_path / "step_1", anchored, second_batch(DATA), DATA, ref=model)
    assert lines[1]["loss"] == pytest.approx(loss, rel=1e-5)

    shutil.move(steps / "step_2", tmp_path / "straight")
    point_at(steps, "latest", "step_1")
    shutil.rmtree(tmp_path / "given")
    shutil.rmtree(tmp_path / "run" / "adapter")
    ranks4.run("jobs:train_steps", settings={**settings, "trainer.resume": "must"}, valid=[32])
    same_checkpoints(steps / "step_2", tmp_path / "straight")
    assert without_times(metrics(tmp_path / "run")) == without_times(lines)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_the_optimizer_starts_from_the_adapters_that_were_given(
    ranks4: RankGroup, model: Path, trained: tuple[Path, Path], tmp_path: Path, distributed: bool
) -> None:
    """In bf16 the optimizer writes its fp32 copies back into the model: after a step of nothing they are the given adapters still."""
    checkpoint, peft_dir = trained
    settings = lora(
        model,
        tmp_path / "run",
        peft__adapter=str(peft_dir),
        peft__dropout=0.0,
        precision="bf16",
        optim__lr=1e-30,
        optim__distributed=distributed,
        parallel__pp_size=1,
    )
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    found = adapters_in(tmp_path / "run" / "checkpoints" / "latest")
    given = adapters_in(checkpoint)
    assert found.keys() == given.keys()
    assert [key for key, value in given.items() if not torch.equal(found[key], value.bfloat16())] == []
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["peft"]["adapter"] == str(
        peft_dir
    )
