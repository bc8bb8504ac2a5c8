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

from asft_nemo import slurm_ranks
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError
from asft_nemo.run_dir import claim_run_dir
from asft_nemo.run_lock import lock_run_dir
from asft_nemo.stop_signal import Stopped

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


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_has_done_its_work_leaves_no_lock(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends without the end of its interpreter, which would release it."""

    def trains(run: RunConfig, job: str) -> None:
        claim_run_dir(run, data_fingerprint="x")
        assert (tmp_path / ".run.lock").exists()
        if stopped:
            raise Stopped("step 3")

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("ASFT_LAUNCHER_PID", raising=False)
    monkeypatch.setattr("asft_nemo.ranks.leave", leave)
    monkeypatch.setattr("asft_nemo.launching.settings.refuse_other_settings", lambda _: None)
    monkeypatch.setattr(slurm_ranks, "_enter", lambda: None)
    monkeypatch.setattr(slurm_ranks, "set_up_logging", lambda rank: None)
    monkeypatch.setattr(slurm_ranks.stop_signal, "listen", lambda at_once: None)
    monkeypatch.setattr(slurm_ranks, "_do", trains)
    run = compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False)
    with pytest.raises(SystemExit) as left:
        slurm_ranks.run_rank(run, "train")
    assert left.value.code == 0
    assert not (tmp_path / ".run.lock").exists()


def test_with_flock_a_requeue_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    held = lock_run_dir(tmp_path, claim=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match=r"Slurm job 7: wait for it, or choose"):
        lock_run_dir(tmp_path, claim=True)
    held.release()
