"""Stages of different numbers of layers: gradients against the fp64 oracle, checkpoints that any layout reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradients import LAYOUTS, OBJECTIVES, check_step
from kept import some_of
from models import make_model

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

# layout, layers of the model, tied, settings; what each stage then has
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "3_and_1": ("pp2", 4, True, {"parallel.last_stage_layers": 1}),
    "2_and_1_with_the_loss": ("tp2_pp2_sp", 3, False, {"parallel.account_for_loss": True}),
    "1_2_2_1": (
        "pp2_vpp2",
        6,
        False,
        {"parallel.account_for_embedding": True, "parallel.account_for_loss": True},
    ),
    "2_1_2_1": ("pp2_vpp2", 6, True, {"parallel.last_stage_layers": 2}),
}


@pytest.mark.parametrize("case", some_of(CASES, kept=["2_and_1_with_the_loss", "2_1_2_1"]))
def test_gradients_equal_the_oracle(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    layout, layers, tied, shares = CASES[case]
    world, parallel = LAYOUTS[layout]
    model = make_model(tmp_path / "model", tied=tied, num_layers=layers)
    settings = {**OBJECTIVES["asft"], **parallel, **shares}
    group = request.getfixturevalue(f"ranks{world}")
    check_step(group, settings, model, tmp_path, label=case)
