"""Every parameter gradient of real NeMo training steps equals a single-process fp64 computation, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradients import BOUND, LAYOUTS, OBJECTIVES, check_step, megatron_step
from kept import some_of
from models import worst_error
from ranks import RankGroup

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

# The default implementation at every layout and for every objective; the others at the corners.
CASES = [
    *((layout, "asft", "untied", "fused") for layout in LAYOUTS),
    *(("tp2_pp2", name, "untied", "fused") for name in OBJECTIVES if name != "asft"),
    ("tp2", "asft_reverse", "tied", "fused"),
    ("tp2_pp2_sp", "sft_kl", "tied", "fused"),
    ("pp2_vpp2", "sft_kl_reverse", "tied", "fused"),
    *((layout, "asft", "untied", "vocab_parallel") for layout in ("tp2_pp2", "tp2_dp2", "tp2_pp2_vpp2_sp")),
    ("tp2", "asft_reverse", "tied", "vocab_parallel"),
    ("tp2_pp2", "sft_kl", "tied", "vocab_parallel"),
    ("tp2_pp2", "dft", "untied", "vocab_parallel"),
    ("tp2_pp2", "asft", "untied", "dense"),
    ("tp2_pp2_vpp2_sp", "iw_sft", "untied", "fused"),
    ("tp2_pp2_vpp2_sp", "psft", "tied", "fused"),
    ("tp2_dp2", "iw_sft", "tied", "vocab_parallel"),
    ("tp2", "psft", "untied", "dense"),
    ("pp2", "iw_sft", "untied", "dense"),
    ("tp2_pp2_sp", "eaft", "tied", "vocab_parallel"),
]


# every objective, every implementation of the loss, tied and untied, each kind of parallelism
KEPT = [
    *("-".join(case) for case in CASES if case[0] == "tp2_pp2" and case[3] == "fused"),
    *("tp2_dp2-asft-untied-fused", "tp2_pp2_vpp2_sp-asft-untied-fused", "pp2_vpp2-sft_kl_reverse-tied-fused"),
    *(
        "tp2-asft_reverse-tied-vocab_parallel",
        "tp2_pp2-asft-untied-vocab_parallel",
        "tp2_pp2-asft-untied-dense",
    ),
]


@pytest.mark.parametrize(("layout", "name", "weights", "loss"), some_of(CASES, KEPT))
def test_gradients_equal_the_oracle(
    layout: str,
    name: str,
    weights: str,
    loss: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Any,
) -> None:
    world, parallel = LAYOUTS[layout]
    settings = {**OBJECTIVES[name], **parallel, "loss.implementation": loss}
    group = request.getfixturevalue(f"ranks{world}")
    label = f"{layout} {name} {weights} {loss}"
    record_property(
        "worst_relative_error", check_step(group, settings, models[weights], tmp_path, label=label)
    )


def test_split_into_micro_batches_changes_nothing(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """The same global batch in micro batches of 1, 2 and 4 examples, valid tokens 0 to 32 each: the same gradients."""
    found = {}
    for size in (1, 2, 4):
        settings = {**OBJECTIVES["asft"], "parallel.tp_size": 2, "trainer.micro_batch_size": size}
        found[size] = megatron_step(ranks2, settings, models["untied"], tmp_path / str(size)).gradients
    for size in (2, 4):
        error, where = worst_error(found[size], {name: value.double() for name, value in found[1].items()})
        assert error <= BOUND, (size, error, where)


def test_micro_batch_averaging_is_another_mean(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """`loss.normalize_by=micro_batch` weighs micro batches, not tokens: with unequal counts the gradients differ."""
    settings = {**OBJECTIVES["asft"], "parallel.tp_size": 2}
    by_tokens = megatron_step(ranks2, settings, models["untied"], tmp_path / "tokens").gradients
    settings["loss.normalize_by"] = "micro_batch"
    by_batch = megatron_step(ranks2, settings, models["untied"], tmp_path / "micro_batch").gradients
    error, _ = worst_error(by_batch, {name: value.double() for name, value in by_tokens.items()})
    assert error > 100 * BOUND
