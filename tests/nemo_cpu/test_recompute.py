"""Activations that are computed again change nothing but memory and time: the same losses, gradients and weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kept import some_of
from ranks import RankGroup
from real_runs import VALID, all_tensors, metrics, settings_of, without_times

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

STEPS = 2

# settings, and how often a rank of two layers keeps an input alone for each micro batch
RECOMPUTE: dict[str, tuple[dict[str, Any], int]] = {
    "selective": ({"recompute.granularity": "selective"}, 2),
    "every_layer": ({"recompute.granularity": "full"}, 2),
    "pairs_of_layers": ({"recompute.granularity": "full", "recompute.num_layers": 2}, 1),
    "one_layer_of_a_stage": ({"recompute.granularity": "full", "recompute.method": "block"}, 1),
}
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sequence_parallel": ({"parallel.sequence_parallel": True}, tuple(RECOMPUTE)),
    "packed_bf16": ({"data.packing": True, "precision": "bf16"}, ("selective", "every_layer")),
    # masks of dropout must come out a second time as they came out first
    "lora_with_dropout": (
        {"peft.name": "lora", "peft.dropout": 0.2, "reference.form": "adapter_disabled"},
        ("every_layer",),
    ),
}


@pytest.mark.parametrize("run", some_of(RUNS, kept=["sequence_parallel", "lora_with_dropout"]))
def test_recomputed_steps_are_the_same_steps(
    run: str, ranks4: RankGroup, model: Path, tmp_path: Path
) -> None:
    more, forms = RUNS[run]
    size = 1 if "data.packing" in more else 2
    found = {}
    for name in ("none", *forms):
        switches, kept_of_micro_batch = RECOMPUTE.get(name, ({}, 0))
        settings = {
            **settings_of(model, tmp_path / name, trainer__max_steps=STEPS, trainer__micro_batch_size=size),
            **more,
            **switches,
        }
        kept = ranks4.run("recompute_jobs:train_and_count", settings=settings, valid=VALID)
        assert kept == [kept_of_micro_batch * STEPS * 8 // size] * 4, (
            name
        )  # the frozen reference keeps nothing
        tensors = all_tensors(tmp_path / name / "checkpoints" / "latest")
        found[name] = without_times(metrics(tmp_path / name)), tensors
    lines, weights = found["none"]
    for name in forms:
        assert found[name][0] == lines, name
        assert [key for key in weights if not torch.equal(found[name][1][key], weights[key])] == [], name
