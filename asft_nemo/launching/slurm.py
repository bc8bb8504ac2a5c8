"""What Slurm's own commands say. Every call has a time limit: a controller that does not answer must not hang a command."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asft_nemo.config.schema import ClusterConfig
from asft_nemo.errors import UserError

SECONDS = 30.0
#: states of a job that is, or will be, on the cluster
ALIVE = (
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
)


@dataclass(frozen=True)
class JobState:
    """One job's state, as Slurm's accounts have it.

    Attributes:
        state: Slurm's word, for example COMPLETED.
        exit_code: CODE:SIGNAL of the batch script.
        elapsed: of its latest attempt.
        nodes: where it ran, as Slurm abbreviates them.
        reason: why it waits, where it does.
    """

    state: str
    exit_code: str = ""
    elapsed: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def alive(self) -> bool:
        """Whether it runs or will."""
        return self.state in ALIVE

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return not self.alive and self.state not in ("COMPLETED", "UNKNOWN")


def call(*words: str) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: it is not installed, failed, or did not answer.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not installed here: call asft on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer in {SECONDS:.0f} s: is the cluster's controller up (`scontrol ping`)?"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"`{' '.join(words)}` failed: {' '.join(error.stderr.split())}") from None


def states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """State by job id; UNKNOWN for a job that Slurm's accounts do not (yet) have.

    Raises:
        UserError: as `call`.
    """
    fields = ("JobIDRaw", "State", "ExitCode", "Elapsed", "NodeList")
    text = call("sacct", "-X", "-P", "-n", "-j", ",".join(job_ids), "-o", ",".join(fields))
    found = {job_id: JobState("UNKNOWN") for job_id in job_ids}
    for row in csv.DictReader(text.splitlines(), fieldnames=fields, delimiter="|"):
        word = row["State"].split()[0] if row["State"] else "UNKNOWN"  # CANCELLED by 1000
        nodes = "" if row["NodeList"].startswith("None") else row["NodeList"]
        found[row["JobIDRaw"]] = JobState(word, row["ExitCode"], row["Elapsed"], nodes)
    waiting = [job_id for job_id, state in found.items() if state.state in ("PENDING", "UNKNOWN")]
    return found | _waiting(waiting, found)


def _waiting(job_ids: Sequence[str], known: dict[str, JobState]) -> dict[str, JobState]:
    """Why jobs wait, of those that the controller knows; accounts lag behind it."""
    found: dict[str, JobState] = {}
    for job_id in job_ids:
        try:
            text = call("squeue", "--noheader", "--job", job_id, "--format", "%T|%r").strip()
        except UserError:  # squeue's "Invalid job id": it is over
            continue
        if text:
            state, _, reason = text.splitlines()[0].partition("|")
            found[job_id] = JobState(state, known[job_id].exit_code, known[job_id].elapsed, "", reason)
    return found


def cancel(job_ids: Sequence[str]) -> None:
    """Cancels jobs that run or wait; a job that is over stays as it is.

    Raises:
        UserError: as `call`.
    """
    call("scancel", *job_ids)


def check_cluster(cluster: ClusterConfig) -> None:
    """Asks the cluster whether it is the one that the settings speak of.

    Raises:
        UserError: Slurm's commands are missing or fail, jobs are not accounted for, there is no such partition, or no pyxis.
    """
    for program in ("sbatch", "srun", "sacct", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(
                f"cluster={cluster.name} needs Slurm, and {program} is not installed here: call asft launch on a login node, or add --dry-run "
                "to see the scripts"
            )
    partitions = _partitions()
    for key in ("partition", "cpu_partition"):
        name = getattr(cluster, key)
        for one in (name or "").split(","):
            if one and one not in partitions:
                raise UserError(
                    f"cluster.{key}={name} is no partition of this cluster: set one of {', '.join(sorted(set(partitions)))}"
                )
    call("sacct", "-n", "-j", "1")  # NeMo-Run and asft status learn from accounts what became of a job
    if cluster.pyxis and "--container-image" not in _srun_help():
        raise UserError(
            f"cluster={cluster.name} runs containers by pyxis, and this srun has no --container-image: set cluster=slurm to run without a "
            "container, or ask the cluster's administrators for pyxis"
        )


def _partitions() -> list[str]:
    """Names of the cluster's partitions, those that are not shown to everybody too, by the first call that needs a cluster to answer.

    Raises:
        UserError: none does.
    """
    try:
        return call("sinfo", "--all", "--noheader", "--format", "%R").split()
    except UserError as error:
        raise UserError(
            f"no Slurm cluster answers here: call asft launch on a login node, or set SLURM_CONF=<its slurm.conf> ({error})"
        ) from None


def _srun_help() -> str:
    found = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=SECONDS)
    return found.stdout + found.stderr


def test_only(script: Path) -> str:
    """Slurm's own opinion of a batch script, without submitting it.

    Returns:
        What it says: when and where the job would start.

    Raises:
        UserError: it would be refused.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", str(script)], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch did not answer in {SECONDS:.0f} s: is the cluster's controller up (`scontrol ping`)?"
        ) from None
    said = " ".join(done.stderr.replace("sbatch: ", "").split())
    if done.returncode:
        raise UserError(f"the cluster refuses {script.name}: {said}")
    return said
