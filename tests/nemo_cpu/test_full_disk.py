"""A checkpoint that does not fit on the disk: whatever the writers said, the disk is named where it is full, and only there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from models import make_model_with_tokenizer
from ranks import RankError, RankGroup
from real_runs import all_tensors, metrics, settings_of, without_times

from asft_nemo.errors import CheckpointError
from asft_nemo.nemo.checkpoints import full_disk_named

pytestmark = pytest.mark.nemo


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 4096)
    said = r"partial_step_3 cannot be written, for that disk is full \(4096 bytes are free\): make room, then go on .* trainer.resume=must"
    with pytest.raises(CheckpointError, match=said), full_disk_named(tmp_path / "partial_step_3"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def test_another_failure_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 1 << 40)
    with pytest.raises(RuntimeError, match="unexpected pos"), full_disk_named(tmp_path / "partial_step_3"):
        raise RuntimeError("unexpected pos")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_with_tokenizer(tmp_path_factory.mktemp("model") / "base")


def become(disk: Path, nbytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", str(disk)], check=True)


def nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.long
@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_up_while_ranks_write(
    ranks2: RankGroup, model: Path, tmp_path: Path, disk: Path
) -> None:
    """The second checkpoint does not fit: the disk is named, the first one stays, and with room the run goes on to the same bits."""
    lines = [f'{{"instruction": "copy {n}:", "response": "{n}{n}"}}' for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")

    def settings(folder: Path) -> dict[str, object]:
        return {
            **settings_of(model, folder, trainer__max_steps=2, trainer__checkpoint_every=1),
            "parallel.pp_size": 1,
            "run.world_size": 2,
            "data.template": "raw",
            "alarms.hang_seconds": 60,
            "data.train": [str(tmp_path / "train.jsonl")],
            "trainer.resume": "if_exists",
        }

    whole = tmp_path / "whole"
    ranks2.run("jobs:train_itself", settings=settings(whole))
    checkpoint = nbytes(whole / "checkpoints" / "step_2")
    become(disk, nbytes(whole) - nbytes(whole / "checkpoints") + checkpoint + checkpoint // 2)
    disturbed = RankGroup(2)
    try:
        said = r"CheckpointError: .*partial_step_2 cannot be written, for that disk is full \(\d+ bytes are free\): make room, then go on"
        with pytest.raises(RankError, match=said):
            disturbed.run("jobs:train_itself", settings=settings(disk / "run"))
    finally:
        disturbed.close()
    assert (disk / "run" / "checkpoints" / "latest").resolve().name == "step_1"
    become(disk, 1 << 30)
    ranks2.run("jobs:train_itself", settings=settings(disk / "run"))
    assert without_times(metrics(disk / "run")) == without_times(metrics(whole))
    ours, theirs = (all_tensors(run / "checkpoints" / "latest") for run in (disk / "run", whole))
    assert {key: value.tolist() for key, value in ours.items()} == {
        key: value.tolist() for key, value in theirs.items()
    }
