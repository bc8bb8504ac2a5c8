"""launch.json of a run: which jobs were submitted for it, so that status, logs and cancel find them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from asft_nemo.errors import UserError
from asft_nemo.run_dir import write_json

RECORD = "launch.json"


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
        write_json(folder / RECORD, {"format": 1, **asdict(self)})

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
        UserError: nothing was launched there.
    """
    try:
        values = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {RECORD}: give the run.dir of a run that `asft launch` started"
        ) from None
    values.pop("format")
    jobs = tuple(Job(**{**job, "after": tuple(job["after"])}) for job in values.pop("jobs"))
    return Record(**values, jobs=jobs)
