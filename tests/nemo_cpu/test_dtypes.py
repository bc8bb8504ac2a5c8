"""Dtypes of a run in bf16 while it trains: parameters bf16; gradients, masters and moments fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankGroup
from real_runs import VALID, settings_of

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

FP32, BF16 = ["torch.float32"], ["torch.bfloat16"]


@pytest.mark.parametrize("distributed", [False, True])
def test_parameters_bf16_and_all_that_adds_up_fp32(
    ranks2: RankGroup, model: Path, tmp_path: Path, distributed: bool
) -> None:
    settings = {
        **settings_of(
            model, tmp_path, trainer__max_steps=2, precision="bf16", optim__distributed=distributed
        ),
        "parallel.tp_size": 1,
        "parallel.pp_size": 1,
        "run.world_size": 2,
    }
    for rank in ranks2.run("dtype_jobs:dtypes_while_training", settings=settings, valid=VALID):
        assert rank["parameters"] == BF16
        assert rank["params_dtype"] == BF16 * 2
        for kept in ("main_grad", "masters", "exp_avg", "exp_avg_sq"):
            assert rank[kept] == FP32, kept
        own, held = rank["numbers"]["parameters"], rank["numbers"]["masters"]
        if distributed:
            assert rank["optimizers"] == ["DistributedOptimizer"]
            assert 0.3 * own < held < 0.7 * own  # this rank's half, cut at buckets' ends
        else:
            assert rank["optimizers"] == ["Float16OptimizerWithFloat16Params"]
            assert held == own
