"""Packed rows train what their examples train: gradients against the examples one by one in fp64, at every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import ShortTokens
from models import make_model, oracle_gradients, worst_error
from test_gradients import (
    BATCH,
    BOUND,
    LAYOUTS,
    LENGTH,
    OBJECTIVES,
    VALID,
    chosen_objective,
    megatron_gradients,
    second_batch,
)

from asft_nemo.data import PackedDataset

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

CASES = [
    ("tp2_pp2_sp", "asft", "untied"),
    ("pp2_vpp2", "asft_reverse", "tied"),
    ("tp2_dp2", "sft", "untied"),
    ("tp2_pp2", "iw_sft", "untied"),
    ("tp2_pp2_vpp2_sp", "psft", "tied"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, tied=name == "tied") for name in ("tied", "untied")}


@pytest.mark.parametrize(("layout", "name", "weights"), CASES, ids=["-".join(case) for case in CASES])
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
    found, policy, value = megatron_gradients(group, settings, models[weights], tmp_path)
    data = ShortTokens(size=64, sequence_length=LENGTH, valid=VALID)
    packed = PackedDataset(data)
    rows = [packed.rows[row] for (row,) in second_batch(42, packed)]
    assert len(rows) == BATCH
    assert max(len(row) for row in rows) > 2
    chosen = chosen_objective(settings)
    expected, loss = oracle_gradients(
        policy,
        chosen,
        rows,
        data,
        ref=models[weights] if chosen.needs_reference else None,
        old=models[weights] if chosen.needs_old_policy else None,
    )
    error, where = worst_error(found, expected)
    print(f"packed {layout} {name} {weights}: worst gradient error {error:.1e} of max |grad| ({where})")
    assert error <= BOUND, (error, where)
    assert value == pytest.approx(loss, rel=1e-5)
