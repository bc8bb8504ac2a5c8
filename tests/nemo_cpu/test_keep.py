"""Removing checkpoints that do not stay: nothing that is half removed passes for a checkpoint, and what cannot be removed ends no run.

Which was the best is the same for all ranks.
"""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from ranks import RankError, RankGroup

from asft_nemo.nemo.keep import Keep
from asft_nemo.run_dir import checkpoint_steps

pytestmark = pytest.mark.nemo


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step}" / "file").write_text("x")
    return tmp_path


def test_the_last_stay(run_dir: Path) -> None:
    Keep("last:2", run_dir).tidy(3, best=False)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_2", "step_3"]


def test_what_cannot_be_removed_is_told_and_is_no_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    Keep("last:1", run_dir).tidy(3, best=False)
    assert checkpoint_steps(run_dir / "checkpoints") == [3]
    assert "removed_step_1 could not be removed" in caplog.text
    assert "removed_step_2 could not be removed" in caplog.text


def test_best_is_on_the_disk_before_the_best_so_far_goes(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power in between has a checkpoint under ``best``."""
    done, rename, fsync = list[str](), Path.rename, os.fsync
    folder = run_dir / "checkpoints"
    (folder / "best").symlink_to("step_1")

    def renamed(path: Path, new: Path) -> Path:
        done.append(f"gone: {path.name}")
        return rename(path, new)

    def synced(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) == folder.resolve():
            done.append(f"synced: best is {os.readlink(folder / 'best')}")
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    keep = Keep("best:validation_loss", run_dir)
    assert keep.is_best(1.0)
    keep.tidy(3, best=True)
    assert done == ["synced: best is step_3", "gone: step_1", "gone: step_2"]


def view(folder: Path, *, link: int | None, end: str = "") -> str:
    """A run's folder as a machine shows it: three checkpoints, the second the best, perhaps not the newest link, and an end of metrics.jsonl."""
    for step in (1, 2, 3):
        (folder / "checkpoints" / f"step_{step}").mkdir(parents=True)
    if link is not None:
        (folder / "checkpoints" / "best").symlink_to(f"step_{link}")
    values = {1: 2.0, 2: 1.0, 3: 3.0}
    lines = [json.dumps({"step": step, "validation_nll": value}) for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + end)
    return str(folder)


@pytest.mark.multiproc
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("links", "saved"),
    [((2, 2), [5]), ((2, None), [5]), ((None, 2), [5]), ((1, 2), [5]), ((2, 1), [5]), ((None, None), [4, 5])],
)
def test_ranks_go_on_from_the_same_best(
    ranks2: RankGroup, tmp_path: Path, links: tuple[int | None, int | None], saved: list[int]
) -> None:
    """Two machines, of which one may see no link yet, or the one before: 1.5 is no best after 1.0 and 0.5 is, on both."""
    folders = [view(tmp_path / f"machine_{rank}", link=link) for rank, link in enumerate(links)]
    found = ranks2.run("keep_jobs:saved_as_best", timeout=120, folders=folders, resumed=3, values=[1.5, 0.5])
    assert found == [saved, saved]


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_the_rank_that_mends_the_metrics_reads_them(ranks2: RankGroup, tmp_path: Path) -> None:
    """A kill in the middle of a line: the first rank comes to read what was best before the second, which writes, has dropped that line."""
    folder = view(tmp_path / "run", link=2, end='{"step": 4, "valida')
    found = ranks2.run(
        "keep_jobs:saved_as_best", timeout=120, folders=[folder, folder], resumed=3, values=[1.5, 0.5]
    )
    assert found == [[5], [5]]


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_a_best_of_which_the_value_is_lost_is_not_replaced(ranks2: RankGroup, tmp_path: Path) -> None:
    folder = Path(view(tmp_path / "run", link=2))
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "validation_nll": 2.0}\n')
    assert Keep("best:validation_nll", folder).value_at(2) == -math.inf
    metrics.unlink()
    with pytest.raises(RankError, match=r"best leads to step 2, and metrics.jsonl does not say"):
        ranks2.run(
            "keep_jobs:saved_as_best", timeout=120, folders=[str(folder)] * 2, resumed=3, values=[1.5, 0.5]
        )
    assert os.readlink(folder / "checkpoints" / "best") == "step_2"
