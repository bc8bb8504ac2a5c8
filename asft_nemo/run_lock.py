"""Who may write into a run's folder: one process at a time, and others are told which."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from asft_nemo.errors import ConfigError

logger = logging.getLogger(__name__)


def lock_run_dir(folder: Path, *, claim: bool) -> FileLock:
    """A lock on a run's folder, held while it is written to; released when the process that holds it ends, however it ends.

    A file system without flock (Lustre mounted so) knows no such lock: there the lock file itself stands for it, and stays when its holder is
    ended. A job of Slurm that was requeued takes it over from what it was before, which Slurm has ended.

    Who holds it is said in a file of its own, which an attempt to lock does not empty; what a process that has ended left there is nobody's.

    Args:
        folder: run.dir.
        claim: whether this process is named as the holder.

    Raises:
        ConfigError: another process trains in this folder.
    """
    owner, lock = folder / ".run.owner", FileLock(str(folder / ".run.lock"))
    if not _acquired(lock):
        holder = owner.read_text() if owner.exists() else "another process"
        stays = isinstance(lock, SoftFileLock)
        if stays and _requeued_since(holder):
            logger.info(
                "%s is left from this job before it was requeued (no flock here): it goes", lock.lock_file
            )
            Path(lock.lock_file).unlink(missing_ok=True)
        if not (stays and _acquired(lock)):
            ended = f" (where that has ended, remove {lock.lock_file})" if stays else ""
            raise ConfigError(
                f"run.dir={folder} is being trained in by {holder}: wait for it{ended}, or choose another run.dir"
            )
    if claim:
        owner.write_text(this_process())
    return lock


def this_process() -> str:
    """This process in the words that a lock's owner leaves: its id, user, host, and job of Slurm."""
    user = os.environ.get("USER", f"user {os.getuid()}")  # a container may know no name
    words = f"process {os.getpid()} of {user} on {socket.gethostname()}"
    if "SLURM_JOB_ID" in os.environ:
        words += f", Slurm job {os.environ['SLURM_JOB_ID']}"
        if requeues := _requeues():
            words += f" (requeue {requeues})"
    return words


def _requeued_since(holder: str) -> bool:
    """Whether the holder was this job of Slurm before it was requeued."""
    job = re.search(r", Slurm job (\S+?)(?: \(requeue (\d+)\))?$", holder)
    return job is not None and job[1] == os.environ.get("SLURM_JOB_ID") and int(job[2] or 0) < _requeues()


def _requeues() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
