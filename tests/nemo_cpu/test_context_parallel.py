"""Context parallelism computes what one rank computes: gradients in fp64, losses of a run, checkpoints, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradients import BATCH, LENGTH, OBJECTIVES, VALID, check_step, second_batch
from jobs import RandomTokens, ShortTokens
from kept import some_of
from ranks import RankGroup
from real_runs import metrics, settings_of, without_times
from test_distributed_optimizer import KEPT, OVERLAPPED, back_to_step_2

from asft_nemo.data import PackedDataset
from asft_nemo.data.context_slices import segment_multiple

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

CP2 = {"parallel.cp_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, CP2),
    "cp4": (4, {"parallel.cp_size": 4}),
    "cp2_dp2": (4, CP2),
    "tp2_cp2_sp": (4, {**CP2, "parallel.tp_size": 2, "parallel.sequence_parallel": True}),
    "pp2_cp2": (4, {**CP2, "parallel.pp_size": 2}),
    "pp2_vpp2_cp2": (4, {**CP2, "parallel.pp_size": 2, "parallel.vpp_size": 2}),
}
CASES = [
    ("cp2", "asft", "untied", "rows"),
    ("cp4", "asft", "untied", "rows"),
    ("cp2_dp2", "asft_reverse", "tied", "rows"),
    ("tp2_cp2_sp", "asft", "untied", "rows"),
    ("pp2_vpp2_cp2", "psft", "tied", "rows"),
    ("cp2", "asft", "tied", "packed"),
    ("cp4", "asft", "untied", "packed"),
    ("tp2_cp2_sp", "asft", "untied", "packed"),
    ("pp2_cp2", "asft_reverse", "tied", "packed"),
]


CORNERS = ("cp2-asft-untied-rows", "pp2_vpp2_cp2-psft-tied-rows", "tp2_cp2_sp-asft-untied-packed")


@pytest.mark.parametrize(("layout", "name", "weights", "items"), some_of(CASES, CORNERS))
def test_gradients_equal_the_oracle(
    layout: str,
    name: str,
    weights: str,
    items: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Every parameter's gradient of a step whose sequences are shared, against each example alone in transformers in fp64."""
    world, parallel = LAYOUTS[layout]
    settings = {**OBJECTIVES[name], **parallel, "data.packing": items == "packed"}
    group = request.getfixturevalue(f"ranks{world}")
    data: RandomTokens = RandomTokens(size=64, sequence_length=LENGTH, valid=VALID)
    batches = second_batch(data)
    if items == "packed":
        data = ShortTokens(size=64, sequence_length=LENGTH, valid=VALID)
        packed = PackedDataset(data, multiple_of=segment_multiple(parallel["parallel.cp_size"]))
        batches = [packed.rows[row] for (row,) in second_batch(packed)]
        assert max(len(row) for row in batches) > 1
    assert len(batches) == BATCH
    label = f"{items} {layout} {name} {weights}"
    check_step(group, settings, models[weights], tmp_path, label=label, data=data, batches=batches)


TP2_DP2 = {"parallel.pp_size": 1}
DP4 = {"parallel.tp_size": 1, "parallel.pp_size": 1}
LORA = {"peft.name": "lora", "peft.dropout": 0.0, "reference.form": "adapter_disabled"}
# name -> (a layout without and one with context parallelism, settings of both)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "resident": (TP2_DP2, {**TP2_DP2, **CP2, "parallel.sequence_parallel": True}, OVERLAPPED),
    "lora": (DP4, {**DP4, **CP2, "parallel.pp_size": 2}, LORA),
    "by_micro_batch": (DP4, {**DP4, **CP2}, {"loss.normalize_by": "micro_batch"}),
}


@pytest.mark.parametrize("case", some_of(RUNS, kept=["resident"]))
def test_a_run_is_that_of_data_parallel_ranks(
    case: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Four steps and two validations: every logged value, and a checkpoint of either layout goes on at the other."""
    without, shared, more = RUNS[case]
    # Adam divides by the gradient's size, which turns rounding into steps of full length; a large eps keeps updates in proportion
    common = {"trainer__max_steps": 4, "trainer__validate_every": 2, "optim__eps": 1e-2, "optim__lr": 3e-2}
    layouts = {"without": without, "shared": shared}
    for name, layout in layouts.items():
        settings = {**settings_of(models["untied"], tmp_path / name, **common), **KEPT, **more, **layout}
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID, validation=8)
    expected = metrics(tmp_path / "without")
    assert_close(metrics(tmp_path / "shared"), expected)
    assert metrics(tmp_path / "shared")[0]["kl"] == 0.0
    if case != "resident":
        return
    for name, other in (("shared", without), ("without", shared)):
        back_to_step_2(tmp_path / name / "checkpoints")
        settings = settings_of(models["untied"], tmp_path / name, **common, trainer__resume="must")
        settings |= {**KEPT, **more, "parallel.sequence_parallel": False, **other}
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID, validation=8)
        assert_close(metrics(tmp_path / name), expected)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """What two runs logged is the same up to rounding: 1e-5 of each value, and 1e-7 nats of a divergence."""
    assert len(found) == len(expected) == 4
    assert expected[-1]["validation_kl"] > 1e-4
    for one, other in zip(without_times(found), without_times(expected), strict=True):
        assert one["tokens"] == other["tokens"]
        numbers = [key for key, value in other.items() if value is not None]
        assert [key for key, value in one.items() if value is not None] == numbers
        for key in numbers:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), (one["step"], key)
