"""Two published runs of NVIDIA's NeMo performance summaries, on H100 of 80 GB in FP8: nothing is fitted to one of them alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asft_nemo.planner.gpus import gpu
from asft_nemo.planner.plan import plan_of
from asft_nemo.planner.precision import WIDTHS
from asft_nemo.planner.published import published_spec

SPEC, H100 = published_spec("meta-llama/Meta-Llama-3-70B"), gpu("h100-80gb")
SHARED: dict[str, Any] = {
    "precision": "fp8_current",
    "parallel__pp_size": 4,
    "parallel__sequence_parallel": True,
    "parallel__tp_comm_overlap": True,
    "data__sequence_length": 4096,
    "trainer__global_batch_size": 32,
    "optim__distributed": True,
    "optim__overlap_grad_reduce": True,
    "optim__overlap_param_gather": True,
}
# What these runs do and ours do not: FP8 weights without their transposed copies, gradients summed in bf16, no layer in bf16, fused kernels
THEIRS = replace(WIDTHS["fp8_current"], linear_weight=1, gradient=2, edge_layers=0, fused=True)


def test_full_fine_tuning_of_llama3_70b_on_32_gpus(settle) -> None:
    run = settle(**SHARED, parallel__tp_size=4, parallel__vpp_size=5, run__world_size=32)
    plan = plan_of(run, SPEC, H100, widths=THEIRS)
    assert plan.fullest.peak / 1e9 == pytest.approx(58.8, rel=0.10)
    assert plan.step.tokens_per_second_per_gpu == pytest.approx(1638, rel=0.15)
    assert plan.step.model_flops / plan.step.seconds / 32 / 1e12 == pytest.approx(710, rel=0.15)


def test_lora_of_llama3_70b_on_8_gpus(settle) -> None:
    lora = {"peft__name": "lora", "peft__rank": 16, "peft__targets": ["linear_qkv"]}
    run = settle(**SHARED, **lora, parallel__tp_size=2, parallel__vpp_size=20, run__world_size=8)
    plan = plan_of(run, SPEC, H100, widths=THEIRS)
    assert plan.step.tokens_per_second_per_gpu == pytest.approx(2643, rel=0.15)
    assert plan.fits
