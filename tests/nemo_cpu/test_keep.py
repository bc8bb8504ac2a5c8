"""Removing checkpoints that do not stay: nothing that is half removed passes for a checkpoint, and what cannot be removed ends no run."""

import errno
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
