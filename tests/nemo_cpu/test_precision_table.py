"""Every row of the precision table as Megatron gets it, through Megatron's own config objects and checks. No FP8 kernel runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_alone

pytestmark = [pytest.mark.nemo, pytest.mark.slow]

FP8 = ("fp8_current", "fp8_blockwise", "fp8_delayed")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("precision")
    return run_alone("precision_job:everything", model=str(model), folder=str(folder))[0]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("name", ["bf16", *FP8])
def test_parameters_bf16_masters_and_gradients_fp32(
    found: dict[str, Any], name: str, distributed: bool
) -> None:
    row = found["configs"][f"{name} {distributed}"]
    assert row["params_dtype"] == ["torch.bfloat16"] * 2
    assert row["bf16"] == [True, True]
    assert row["masters"] == "torch.float32"
    assert row["gradients_in_fp32"] is True
    assert (row["fp8_param"], row["parameters_gathered_in_fp8"]) == ("False", False)


def test_plain_fp32_is_left_alone(found: dict[str, Any]) -> None:
    row = found["configs"]["fp32 False"]
    assert (row["fp8"], row["bf16"], row["params_dtype"]) == ("None", [False, False], ["torch.float32"] * 2)


def test_current_scaling_leaves_the_edges_in_bf16(found: dict[str, Any]) -> None:
    row = found["configs"]["fp8_current True"]
    assert (row["fp8"], row["fp8_recipe"]) == ("hybrid", "tensorwise")
    assert row["layers_in_fp8"] == [False, True, True, False]


def test_blockwise_scaling_leaves_nothing_out(found: dict[str, Any]) -> None:
    row = found["configs"]["fp8_blockwise True"]
    assert (row["fp8"], row["fp8_recipe"]) == ("hybrid", "blockwise")
    assert row["layers_in_fp8"] == [True] * 4


def test_delayed_scaling_remembers(found: dict[str, Any]) -> None:
    row = found["configs"]["fp8_delayed True"]
    assert (row["fp8"], row["fp8_recipe"]) == ("hybrid", "delayed")
    assert (row["fp8_amax_history_len"], row["fp8_amax_compute_algo"], row["fp8_margin"]) == (
        "1024",
        "max",
        "0",
    )
    assert row["layers_in_fp8"] == [True] * 4


@pytest.mark.parametrize("name", FP8)
def test_attention_stays_in_bf16_and_the_optimizer_knows_the_recipe_from_the_start(
    found: dict[str, Any], name: str
) -> None:
    row = found["configs"][f"{name} True"]
    assert (row["fp8_dot_product_attention"], row["fp8_multi_head_attention"]) == ("False", "False")
    assert row["optimizer_recipe"] == [row["fp8_recipe"]] * 2


def test_embedding_norm_head_and_loss_are_outside(found: dict[str, Any]) -> None:
    assert all(found["outside"].values()), found["outside"]


def test_rows_know_what_their_kernels_need(found: dict[str, Any]) -> None:
    assert all(found["needs"].values()), found["needs"]
