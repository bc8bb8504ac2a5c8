"""A reference in FP8 as far as it can be seen without Transformer Engine: refusal, config, cache identity, loading, offloading.

Not seen here: any FP8 kernel. `tools/gpu_check.py` runs one where Transformer Engine is.
"""

from __future__ import annotations

from typing import Any

import pytest
from models import make_model
from ranks import run_alone

pytestmark = [pytest.mark.nemo, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp8")
    model = make_model(folder / "hf", tied=False)
    return run_alone("reference_fp8_job:everything", model=str(model), folder=str(folder))[0]


def test_on_a_cpu_it_is_refused_by_the_rank_too(found: dict[str, Any]) -> None:
    assert (
        "needs a GPU and Transformer Engine, and this run has no GPU: set reference.precision"
        in found["refused"]
    )
    assert found["not_refused"] == ""


def test_the_config_asks_for_current_scaling_and_weights_in_fp8(found: dict[str, Any]) -> None:
    assert found["configs"]["reference"] == {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_param": "True",
        "first_last_layers_bf16": "True",
        "num_layers_at_start_in_bf16": "1",
        "num_layers_at_end_in_bf16": "1",
        "fp8_dot_product_attention": "False",
        "fp8_multi_head_attention": "False",
        "bf16": "True",
        "params_dtype": "torch.bfloat16",
        "pipeline_dtype": "torch.bfloat16",
        "autocast_dtype": "torch.bfloat16",
    }
    assert found["configs"]["layers_in_bf16"] == [True, False, False, True]
    assert found["configs"]["row"] == ["fp8", "torch.bfloat16"]


def test_the_cache_job_builds_the_same_config(found: dict[str, Any]) -> None:
    assert found["configs"]["job_differs_in"] == []
    assert found["identity"] == ["bf16", "fp8"]


def test_the_policy_is_left_alone(found: dict[str, Any]) -> None:
    configs = found["configs"]
    assert configs["policy_fp8"] == ["None", False]
    assert configs["policy_changed"] == []
    assert configs["policy_serialised_alike"], (
        "a checkpoint of the policy would tell the reference's precision"
    )


def test_a_base_without_extra_state_loads(found: dict[str, Any]) -> None:
    loading = found["loading"]
    assert loading["differed_before"]
    assert loading["layers_with_extra_state"] > 0
    assert loading["extra_states_given"] == 0
    assert loading["equal_after"]
    assert (loading["embedding"], loading["head"]) == ("torch.bfloat16", "torch.bfloat16")


def test_one_byte_a_weight_is_counted_and_moved(found: dict[str, Any]) -> None:
    parking = found["parking"]
    assert parking["stored_bytes"] == [320 * 32, 2 * 320]
    assert parking["host_bytes"] == [[8192, 2048], [640]]
    assert parking["host_blocks"] == 3 * 4096
    assert parking["left_on_device"] == 0
    assert parking["back"]
