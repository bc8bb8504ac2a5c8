"""The head's gradient goes into Megatron's `main_grad` during the forward pass, and nothing else of a step changes.

Gradients of real NeMo steps are compared with fp64 as in test_gradients.py, here where the way into `main_grad` differs: tied weights on
one stage and on two, the reduction over data-parallel ranks overlapped with backward, virtual stages, averages of micro batches. Memory
that nobody wrote is NaN there, so a dummy gradient that reached anything would show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import (
    BATCH,
    OBJECTIVES,
    VALID,
    Step,
    assert_equal,
    fp64_gradients,
    megatron_step,
    random_tokens,
    second_batch,
    step_settings,
)
from kept import some_of
from ranks import RankGroup

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

ASFT = OBJECTIVES["asft"]
TIMES = ("seconds", "reference_seconds", "tokens_per_second", "tflops_per_gpu", "reference_tflops_per_gpu")
OVERLAP = {"optim.overlap_grad_reduce": True}
TP2, PP2 = {"parallel.tp_size": 2}, {"parallel.pp_size": 2}
VPP2 = {**PP2, "parallel.vpp_size": 2}

# name -> (ranks, tied or untied, settings); data-parallel ranks are what the layout leaves over
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tied_tp2": (2, "tied", TP2),
    "tied_dp2_overlap": (2, "tied", OVERLAP),
    "untied_dp2_overlap": (2, "untied", OVERLAP),
    "untied_pp2_vpp2_overlap": (2, "untied", {**VPP2, **OVERLAP}),
    "tied_pp2_vpp2_overlap": (2, "tied", {**VPP2, **OVERLAP}),
    "untied_tp2_micro_batch_means": (2, "untied", {**TP2, "loss.normalize_by": "micro_batch"}),
    "tied_pp2_dp2_overlap": (4, "tied", {**PP2, **OVERLAP}),
    "untied_tp2_pp2_sp": (4, "untied", {**TP2, **PP2, "parallel.sequence_parallel": True}),
}


def mean_of_micro_batches(step: Step, model: Path) -> tuple[dict[str, torch.Tensor], float]:
    """In fp64: the mean of the micro batches' means; those without a learned token do not count."""
    data = random_tokens()
    parts = [
        fp64_gradients(step, ASFT, model, data=data, batches=[batch])
        for batch in second_batch(data)
        if data[batch[0]]["loss_mask"].any()
    ]
    mean = {name: torch.stack([part[0][name] for part in parts]).mean(0) for name in parts[0][0]}
    return mean, sum(part[1] for part in parts) / len(parts)


@pytest.mark.parametrize(
    "case", some_of(CASES, kept=["tied_tp2", "untied_tp2_micro_batch_means", "tied_pp2_dp2_overlap"])
)
def test_gradients_equal_the_oracle(
    case: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Any,
) -> None:
    """Every parameter's gradient, what the head's forward passes used, and what was allocated for it."""
    world, weights, more = CASES[case]
    group: RankGroup = request.getfixturevalue(f"ranks{world}")
    step = megatron_step(
        group, {**ASFT, **more}, models[weights], tmp_path, job="head_gradient_jobs:gradients"
    )
    by = more.get("loss.normalize_by", "tokens")
    expected = (
        fp64_gradients(step, ASFT, models[weights])
        if by == "tokens"
        else mean_of_micro_batches(step, models[weights])
    )
    record_property("worst_relative_error", assert_equal(step, expected, label=case))

    overlap, pp_size = "optim.overlap_grad_reduce" in more, more.get("parallel.pp_size", 1)
    dp_size = world // (pp_size * more.get("parallel.tp_size", 1))
    heads = [one for one in step.answers if one["sinks"]]
    assert len(heads) == world // pp_size
    for one in heads:
        # every forward pass of both steps, with the scale where it is known
        assert one["sinks"] == [[True, True, 1.0 if by == "tokens" else None]] * (2 * BATCH // dp_size)
    assert all(one["grads_left"] == 0 for one in step.answers)
    if overlap:
        assert max(max(one["bucket_groups"]) for one in step.answers) > 1
    if pp_size > 1:  # no embedding on the head's rank: whatever has the head's shape belongs to the head
        dummies = ["aten.empty_like.default"] * (BATCH // dp_size if overlap else 0)
        assert all(one["made"] == dummies for one in heads)


def test_validation_between_steps_changes_nothing(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Three steps with a validation pass after each: metrics equal, bit for bit, those of three steps without."""
    lines = {}
    for name, validation in (("plain", 0), ("validated", BATCH)):
        more = {**ASFT, **OVERLAP, "trainer.max_steps": 3}
        settings = step_settings(ranks2, models["tied"], tmp_path / name, more)
        if validation:
            settings["trainer.validate_every"] = 1
        seen = ranks2.run("head_gradient_jobs:train", settings=settings, valid=VALID, validation=validation)
        passes = 3 * BATCH // 2  # of one data-parallel rank
        for one in seen:
            assert one["sinks"].count([True, True, 1.0]) == passes
            assert one["sinks"].count([False, False, None]) == (passes if validation else 0)
            assert len(one["sinks"]) == passes + (passes if validation else 0)
            assert one["main_grad_changed"] == ([False] * 3 if validation else [])
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    assert all(line["validation_loss"] is not None for line in lines["validated"])
    kept = {
        name: [
            {k: v for k, v in line.items() if k not in TIMES and not k.startswith("validation_")}
            for line in found
        ]
        for name, found in lines.items()
    }
    assert len(kept["plain"]) == 3
    assert kept["validated"] == kept["plain"]


def test_bf16_head_gradient_is_not_rounded(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path, record_property: Any
) -> None:
    """In bf16 `main_grad` is the fp32 sum of the head's gradient; by way of autograd each micro batch's is rounded to bf16."""
    more = {**PP2, "precision": "bf16", "objective.name": "dft", "trainer.max_steps": 1}
    settings = step_settings(ranks2, models["untied"], tmp_path / "run", more)
    found = ranks2.run("head_gradient_jobs:low_precision_errors", settings=settings, valid=VALID)
    assert found[0] is None
    errors = found[1]
    record_property("errors", errors)
    print(f"bf16 head gradient against fp64: {errors}")
    assert errors["main_grad"] <= 1e-5
    assert errors["autograd"] >= 100 * errors["main_grad"]


def test_where_main_grad_is_not_used(ranks2: RankGroup) -> None:
    """Which weights have a sink, when its scale is known, and what autograd gets in its place."""
    found = ranks2.run("head_gradient_jobs:decisions")[0]
    assert found["used"]
    assert all(found["not_used"].values()), found["not_used"]
    assert found["scale"] == 1.0
    assert set(found["scale_unknown"].values()) == {None}
    assert found["returned"] == {
        "plain": [None, False],
        "overlap": [[[4, 3], "torch.bfloat16"], True],
        "tied_on_one_stage": [None, False],
        "tied_on_one_stage_overlap": [None, False],
    }
