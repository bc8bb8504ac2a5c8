"""Ranks that see different checkpoints under `latest`, or other data, as machines may, do not train."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from models import make_model_with_tokenizer
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
    [
        ((None, 2), "step_2 on rank 1, the base on rank 0"),
        pytest.param((2, 1), "step_1 on rank 1, step_2 on rank 0", marks=pytest.mark.long),
    ],
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


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run at PP2, and two folders with files of one name whose last rows differ, and one that is as the first."""
    folder = tmp_path_factory.mktemp("machines")
    files = []
    for number, last in enumerate(("19", "91", "19")):
        answers = [*map(str, range(19)), last]
        rows = [json.dumps({"instruction": f"copy {n}:", "response": n}) + "\n" for n in answers]
        file = folder / str(number) / "train.jsonl"
        file.parent.mkdir()
        file.write_text("".join(rows))
        files.append(str(file))
    settings = {
        **settings_of(make_model_with_tokenizer(folder / "model"), folder / "run", trainer__max_steps=1),
        "run.world_size": 2,
        "parallel.tp_size": 1,
        "data.template": "raw",
        "reference.form": "cached",
    }
    return {"settings": settings, "files": files, "folder": folder}


@pytest.mark.parametrize("job", ["cache", "train"])
def test_machines_with_other_rows_are_refused(own_data: dict[str, Any], job: str) -> None:
    """Without the comparison the first stage reads other examples than the last stage's labels are of."""
    settings = {**own_data["settings"], "reference.form": "cached" if job == "cache" else "resident"}
    said = run_alone(
        "jobs:with_own_data", world_size=2, settings=settings, files=own_data["files"][:2], job=job
    )
    host = socket.gethostname()
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"the ranks have different data: those of rank 0 on {host} and of rank 1 on {host} differ in their rows, their tokenizer or their settings: give data.train"
    )
    assert not [*own_data["folder"].glob("run/reference_cache/*")]
    assert not (own_data["folder"] / "run" / "metrics.jsonl").exists()


@pytest.mark.long
def test_the_same_rows_elsewhere_are_the_same(own_data: dict[str, Any], tmp_path: Path) -> None:
    settings = {**own_data["settings"], "run.dir": str(tmp_path / "run"), "reference.form": "resident"}
    files = [own_data["files"][0], own_data["files"][2]]
    said = run_alone("jobs:with_own_data", world_size=2, settings=settings, files=files, job="train")
    assert said == ["", ""]
    assert len(metrics(tmp_path / "run")) == 1
