"""Slow ranks are named, on real ranks whose steps all take equally long; W&B gets what metrics.jsonl has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import RankGroup
from real_runs import alarms_of, metrics, settings_of
from wandb_files import history

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(900)]

VALID = [5, 9, 32, 1, 17, 3, 2, 20]
# Seconds of every rank's step, of which its real work is a small part, and seconds more of the slow one's. With the factor of 2.5 a rank that
# is not slow would be named if the machine held it up by 0.75 s in two of three steps, and the others by nothing; the slow one would be missed
# if the machine held up all others by 0.7 s, and it by nothing.
USUAL, SLEEP = 0.5, 2.5


def train(
    group: RankGroup, settings: dict[str, Any], *, slow: int | None, from_step: int = 1, **more: Any
) -> list[dict[str, Any]]:
    """The alarms of stragglers, by bounds far from what a busy machine's ranks differ by."""
    settings = {**settings, "alarms.straggler_every": 3, "alarms.straggler_factor": 2.5}
    job = {
        "valid": VALID,
        "slow": slow,
        "from_step": from_step,
        "usual_seconds": USUAL,
        "seconds": SLEEP,
        **more,
    }
    group.run("alarm_jobs:train_with_a_slow_rank", timeout=300, settings=settings, **job)
    return [alarm for alarm in alarms_of(Path(settings["run.dir"])) if alarm["kind"] == "straggler"]


def test_the_slow_replica_is_named_and_no_other(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Four data-parallel ranks, the third of which sleeps; the whole step takes as long on all of them."""
    one_rank = {
        "parallel.tp_size": 1,
        "parallel.pp_size": 1,
        "trainer.max_steps": 6,
        "trainer.wandb": "project",
    }
    settings = settings_of(model, tmp_path / "run", **{k.replace(".", "__"): v for k, v in one_rank.items()})
    (alarm,) = train(ranks4, settings, slow=2)  # at step 3; at step 6 it is known
    assert alarm["step"] == 3
    assert alarm["text"].startswith("rank 2 ("), alarm
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    logged = history(folder)
    lines = metrics(tmp_path / "run")
    assert [int(one["step"]) for one in logged] == [1, 2, 3, 4, 5, 6]
    assert [one["nll"] for one in logged] == [line["nll"] for line in lines]
    assert folder.name.endswith((tmp_path / "run" / "wandb_id").read_text().strip())


@pytest.mark.parametrize("slow", [True, False])
def test_slow_ranks_are_found_without_replicas(
    ranks4: RankGroup, model: Path, tmp_path: Path, slow: bool
) -> None:
    """TP2 x PP2. Rank 1's device is slow from the first step on: by its probe, it alone. Rank 3 becomes slow: it and rank 2 wait for each other
    within every layer, and are named together."""
    settings = settings_of(model, tmp_path / "run", trainer__max_steps=6)
    found = train(ranks4, settings, slow=3 if slow else None, from_step=4, slow_device=1 if slow else None)
    named = [(alarm["step"], re.findall(r"(\d) \([^()]*, local rank", alarm["text"])) for alarm in found]
    assert named == ([(3, ["1"]), (6, ["2", "3"])] if slow else [])
    if slow:
        assert "on a small product of matrices" in found[0]["text"]
        assert "of a step" in found[1]["text"]
