"""Ranks that see different checkpoints under `latest`, as over a network file system, do not train."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankGroup, run_alone
from real_runs import VALID, metrics, settings_of

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.timeout(240)]

TP2 = {"run__world_size": 2, "parallel__tp_size": 2, "parallel__pp_size": 1, "parallel__vpp_size": None}


@pytest.fixture(scope="module")
def settings(ranks2: RankGroup, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of a run that has checkpoints of its first two steps and one more step to go."""
    folder = tmp_path_factory.mktemp("start") / "run"
    common = {"trainer__max_steps": 3, "trainer__checkpoint_every": 1, "trainer__keep": "last:2", **TP2}
    settings = settings_of(model, folder, **common)
    ranks2.run("jobs:train_and_die", settings=settings, valid=VALID, after_step=3)
    return {**settings, "trainer.resume": "if_exists"}


@pytest.mark.parametrize(
    ("found", "told"),
    [((2, 1), "step_1 on rank 1, step_2 on rank 0"), ((None, 2), "step_2 on rank 1, the base on rank 0")],
)
def test_all_ranks_refuse(settings: dict[str, object], found: tuple[int | None, ...], told: str) -> None:
    before = metrics(Path(str(settings["run.dir"])))
    said = run_alone(
        "jobs:resume_with_an_old_link", world_size=2, settings=settings, valid=VALID, found=list(found)
    )
    assert len(set(said)) == 1
    assert f"the ranks would not all go on from the same checkpoint: {told};" in said[0]
    assert metrics(Path(str(settings["run.dir"]))) == before


def test_ranks_that_see_the_same_go_on(settings: dict[str, object]) -> None:
    assert run_alone(
        "jobs:resume_with_an_old_link", world_size=2, settings=settings, valid=VALID, found=[2, 2]
    ) == ["", ""]
    assert [line["step"] for line in metrics(Path(str(settings["run.dir"])))] == [1, 2, 3]
