"""The lock on a run's folder where the file system has no flock: a file that stays when its holder is ended."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock

from asft_nemo.errors import ConfigError
from asft_nemo.run_lock import lock_run_dir

pytestmark = pytest.mark.filterwarnings("ignore:flock not supported")


@pytest.fixture(autouse=True)
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(descriptor: int, how: int) -> NoReturn:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileLock:
    """What job 7 left behind: this process stands for one of another host, which nobody here can see ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return lock_run_dir(tmp_path, claim=True)


def test_a_requeued_job_takes_over_from_what_it_was(
    left: FileLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [left]
    for requeue in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(requeue))
        held.append(lock_run_dir(tmp_path, claim=True))
        assert (tmp_path / ".run.owner").read_text().endswith(f", Slurm job 7 (requeue {requeue})")
        with pytest.raises(ConfigError, match=rf"by process {os.getpid()} .*: wait for it"):
            lock_run_dir(tmp_path, claim=True)  # a second one of the same start


@pytest.mark.parametrize(
    "others", [{}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "0"}]
)
def test_others_are_told_what_to_remove(
    left: FileLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    if not others:
        monkeypatch.delenv("SLURM_JOB_ID")
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / ".run.lock"
    said = rf"by process .*, Slurm job 7: wait for it \(where that has ended, remove {re.escape(str(file))}\), or"
    with pytest.raises(ConfigError, match=said):
        lock_run_dir(tmp_path, claim=True)
    assert file.exists()
    left.release()
    lock_run_dir(tmp_path, claim=True)


def test_with_flock_a_requeue_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    held = lock_run_dir(tmp_path, claim=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match=r"Slurm job 7: wait for it, or choose"):
        lock_run_dir(tmp_path, claim=True)
    held.release()
