"""Removing checkpoints that do not stay: nothing that is half removed passes for a checkpoint, and what cannot be removed ends no run."""

import errno
import os
import shutil
from pathlib import Path

import pytest

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
