"""Packed rows train what their examples train: gradients against the examples one by one in fp64, at every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradients import BATCH, LAYOUTS, LENGTH, OBJECTIVES, VALID, check_step, second_batch
from jobs import ShortTokens
from kept import some_of

from asft_nemo.data import PackedDataset

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

CASES = [
    ("tp2_pp2_sp", "asft", "untied"),
    ("pp2_vpp2", "asft_reverse", "tied"),
    ("tp2_dp2", "sft", "untied"),
    ("tp2_pp2", "iw_sft", "untied"),
    ("tp2_pp2_vpp2_sp", "psft", "tied"),
]


@pytest.mark.parametrize(
    ("layout", "name", "weights"),
    some_of(CASES, kept=["tp2_pp2_sp-asft-untied", "tp2_pp2_vpp2_sp-psft-tied"]),
)
def test_gradients_are_those_of_the_examples(
    layout: str,
    name: str,
    weights: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """A step over packed rows has the gradients of a step over their examples, each alone in transformers."""
    world, parallel = LAYOUTS[layout]
    settings: dict[str, Any] = {**OBJECTIVES[name], **parallel, "data.packing": True}
    group = request.getfixturevalue(f"ranks{world}")
    data = ShortTokens(size=64, sequence_length=LENGTH, valid=VALID)
    packed = PackedDataset(data)
    rows = [packed.rows[row] for (row,) in second_batch(packed)]
    assert len(rows) == BATCH
    assert max(len(row) for row in rows) > 2
    label = f"packed {layout} {name} {weights}"
    check_step(group, settings, models[weights], tmp_path, label=label, data=data, batches=rows)
