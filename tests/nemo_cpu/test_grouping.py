"""Micro batches of similar lengths train what their examples train: gradients against the examples one by one in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import BATCH, LAYOUTS, LENGTH, OBJECTIVES, SEED, VALID, check_step
from jobs import ShortTokens
from kept import some_of
from ranks import RankGroup
from real_runs import metrics, settings_of

from asft_nemo.config.paths import project_dir
from asft_nemo.data.grouping import GroupedByLength

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

# With sequence parallelism rows are of 16 or 32 tokens, without of 8 to 32.
CASES = [("tp2_pp2_sp", "asft"), ("tp2_pp2", "psft"), ("tp2_dp2", "iw_sft")]


@pytest.mark.parametrize(("layout", "name"), some_of(CASES, kept=["tp2_pp2_sp-asft"]))
def test_gradients_are_those_of_the_examples(
    layout: str, name: str, model: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A step over micro batches of different lengths has the gradients of its examples, each alone in transformers."""
    world, parallel = LAYOUTS[layout]
    settings: dict[str, Any] = {
        **OBJECTIVES[name],
        **parallel,
        "data.group_by_length": True,
        "trainer.micro_batch_size": 2,
    }
    group = request.getfixturevalue(f"ranks{world}")
    data = ShortTokens(size=64, sequence_length=LENGTH, valid=VALID)
    order = GroupedByLength(data.lengths, seed=SEED, global_batch_size=BATCH)
    items = [[item] for item in order.at(np.arange(BATCH, 2 * BATCH)).tolist()]
    check_step(group, settings, model, tmp_path, label=f"grouped {layout} {name}", data=data, batches=items)


def of_many_lengths(folder: Path, run: str, **more: Any) -> dict[str, Any]:
    """Settings of a run over two epochs of 20 examples, from a few to 60 tokens long."""
    file = folder / "rows.jsonl"
    rows = (
        {"instruction": f"say {n}:", "response": " ".join(str(n) for _ in range(n))} for n in range(1, 21)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = project_dir() / "assets" / "tiny-base"
    return {
        **settings_of(base, folder / run, trainer__max_steps=5, trainer__micro_batch_size=2, **more),
        "data.train": [str(file)],
        "data.template": "raw",
        "data.sequence_length": 64,
        "data.group_by_length": True,
    }


def test_a_cache_of_the_first_epoch_serves_the_second(ranks4: RankGroup, tmp_path: Path) -> None:
    """The reference's hidden states are as wide as each micro batch, computed or read, on every pipeline stage."""
    cached = of_many_lengths(tmp_path, "cached", reference__form="cached", reference__fill="first_epoch")
    widths = ranks4.run("jobs:widths_of_micro_batches", settings=cached)
    assert widths[0] == widths[1] == widths[2] == widths[3]
    assert len(widths[0]) == 5 * 4
    assert len(set(widths[0])) > 3
    assert all(width % 8 == 0 and width <= 64 for width in widths[0])
    ranks4.run("jobs:train_itself", settings=of_many_lengths(tmp_path, "resident"))
    lines = metrics(tmp_path / "cached")
    assert [line["cache_hit_rate"] for line in lines] == [0.0, 0.0, 0.0, 1.0, 1.0]
    for line, other in zip(lines, metrics(tmp_path / "resident"), strict=True):
        assert line["tokens"] == other["tokens"]
        for key in ("loss", "nll", "kl", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-8), key
