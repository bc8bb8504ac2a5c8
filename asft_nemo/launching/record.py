"""launch.json of a run: which jobs were submitted for it, so that status, logs and cancel find them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from asft_nemo.errors import ConfigError, UserError
from asft_nemo.run_dir import write_json
from asft_nemo.run_lock import this_process

RECORD = "launch.json"
_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One stage as it was submitted.

    Attributes:
        stage: its name.
        job_id: Slurm's number; on this machine the name NeMo-Run gave.
        after: stages it waits for.
        script: what the node runs.
        batch_script: what was handed to sbatch; None on this machine.
        logs: folder of its logs.
    """

    stage: str
    job_id: str
    after: tuple[str, ...]
    script: str
    batch_script: str | None
    logs: str

    def log_files(self) -> list[Path]:
        """What its attempts wrote, oldest first; the batch script's own words come before the ranks'."""
        files = [*Path(self.logs).glob("sbatch_*.out"), *Path(self.logs).glob("log-*.out")]
        files += Path(self.logs).rglob("combined.log")  # of NeMo-Run's local scheduler
        return sorted(files, key=lambda file: (file.name.startswith("log-"), file.stat().st_mtime_ns))


@dataclass(frozen=True)
class Record:
    """One launch."""

    experiment: str
    executor: str
    cluster: str
    jobs: tuple[Job, ...]

    def write(self, folder: Path) -> None:
        """Writes launch.json into run.dir."""
        write_json(folder / RECORD, {"format": _FORMAT, **asdict(self)})

    def job(self, stage: str) -> Job:
        """The job of a stage.

        Raises:
            UserError: the launch had no such stage.
        """
        for job in self.jobs:
            if job.stage == stage:
                return job
        raise UserError(
            f"stage '{stage}' was not launched: choose from {', '.join(job.stage for job in self.jobs)}"
        )


def read(folder: Path) -> Record:
    """The record of the latest launch of a run.

    Raises:
        UserError: nothing was launched there, or its record cannot be read.
    """
    file = folder / RECORD
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {RECORD}: give the run.dir of a run that `asft launch` started"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it readable for you") from None
    except ValueError:  # no JSON, or no text at all
        raise _damaged(file) from None
    try:
        written = int(values["format"])
        found = _record(values) if written == _FORMAT else None
    except (KeyError, TypeError, ValueError):
        raise _damaged(file) from None
    if found is None:
        raise UserError(
            f"{file} is of format {written}, and this asft reads format {_FORMAT}: use the asft that launched the run"
        )
    return found


def _damaged(file: Path) -> UserError:
    return UserError(
        f"{file} is damaged: once `squeue --me` shows no job of this run, move the file away and launch the run again"
    )


def _record(values: Any) -> Record:
    """What was written, from what JSON gives.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    jobs = tuple(Job(**{**job, "after": tuple(job["after"])}) for job in values["jobs"])
    found = Record(values["experiment"], values["executor"], values["cluster"], jobs)
    words = [getattr(found, name) for name in ("experiment", "executor", "cluster")]
    for job in jobs:
        words += [job.stage, job.job_id, *job.after, job.script, job.batch_script or "", job.logs]
    if not jobs or not all(isinstance(word, str) for word in words):
        raise ValueError("a record holds words")
    return found


def claim(folder: Path) -> AcquireReturnProxy:
    """Makes run.dir's folder of a launch and keeps other launches out of it.

    Args:
        folder: run.dir.

    Returns:
        The lock, held until the block that it opens, or this process, ends.

    Raises:
        ConfigError: it cannot be made, or another launch is at work in it.
    """
    home = folder / "launch"
    lock, owner = FileLock(str(home / ".lock")), home / ".owner"
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=0)
        owner.write_text(this_process())
    except Timeout:
        holder = owner.read_text() if owner.exists() else "another process"
        raise ConfigError(
            f"run.dir={folder} is being launched by {holder}: wait for it, or choose another run.dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written ({error.strerror}): set run.dir to a folder of yours on a file system that all nodes share"
        ) from None
    return held
