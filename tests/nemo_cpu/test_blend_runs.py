"""A blend in a run: shares, domains, and a resume at another data-parallel size and micro batch that sees the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankGroup
from real_runs import metrics
from test_training import two_files

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

STEPS, BATCH = 4, 8


def test_a_blend_goes_on_at_another_layout(ranks4: RankGroup, tmp_path: Path) -> None:
    """Two files, one with a template of its own, drawn 3 to 1; the second has three rows and begins anew again and again."""
    blend = {
        "data.weights": [0.75, 0.25],
        "data.templates": ["raw", "alpaca"],
        "data.sequence_length": 128,
        "data.validation": [],
        "trainer.validate_every": None,
        "trainer.max_steps": STEPS,
        "trainer.checkpoint_every": 2,
        "trainer.keep": "last:2",
    }
    straight = {**two_files(tmp_path, "straight"), **blend}
    ranks4.run("jobs:train_itself", settings=straight)
    lines = metrics(tmp_path / "straight")
    checkpoints = tmp_path / "straight" / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_2")
    moved = {"parallel.tp_size": 1, "trainer.micro_batch_size": 2, "trainer.resume": "must"}
    ranks4.run("jobs:train_itself", settings={**straight, **moved})
    again = metrics(tmp_path / "straight")
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for one, other in zip(lines[2:], again[2:], strict=True):
        assert set(one["domains"]) == {"copy/rows", "reverse/rows"}
        for name, values in one["domains"].items():
            assert other["domains"][name]["tokens"] == values["tokens"], name
            assert other["domains"][name]["nll"] == pytest.approx(values["nll"], rel=1e-4), name
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
