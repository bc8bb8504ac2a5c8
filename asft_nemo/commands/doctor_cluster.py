"""What `asft doctor` says of Slurm. Every question has a time limit: a controller that does not answer must not hang the doctor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

PROGRAMS = ("sbatch", "srun", "sacct", "squeue", "scancel", "scontrol", "sinfo")  # what asft launch calls
SECONDS = 3.0


def slurm() -> list[tuple[str, str]]:
    """What was looked at and what is there, line by line; one line where there is no Slurm."""
    there = [name for name in PROGRAMS if shutil.which(name)]
    if not there:
        return [
            (
                "Slurm",
                "none on the path: cluster=local runs here; asft launch wants a login node of the cluster",
            )
        ]
    with ThreadPoolExecutor() as pool:
        version, controller, pyxis = pool.map(lambda look: look(), (_version, _controller, _pyxis))
    missing = [name for name in PROGRAMS if name not in there]
    lacks = (
        f"; {', '.join(missing)} missing: asft launch needs them (Debian: slurm-client)" if missing else ""
    )
    return [("Slurm", version + lacks), ("Slurm's controller", controller), ("pyxis", pyxis)]


def _version() -> str:
    code, said = _ask("sinfo", "--version")
    return (
        said if code == 0 else f"installed, but not configured ({said}): set SLURM_CONF, or use a login node"
    )


def _controller() -> str:
    code, said = _ask("sinfo", "--noheader", "--format", "%R")
    if code:
        return f"does not answer ({said})"
    partitions = sorted(set(said.split()))
    return f"answers; partitions: {', '.join(partitions) or 'none'}"


def _pyxis() -> str:
    """pyxis is a plugin of srun, which shows in its options."""
    code, said = _ask("srun", "--help")
    if "--container-image" in said:
        return "srun has --container-image: cluster=slurm_pyxis"
    if code:
        return f"unknown: srun --help failed ({said})"
    return "srun has no --container-image: cluster=slurm runs without containers; the cluster's administrators install pyxis"


def _ask(*words: str) -> tuple[int, str]:
    """Exit code and what a command said; of a failure, its last line.

    It has a session of its own: where a site has put a script in front of Slurm's program, both are ended.
    """
    try:
        asked = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
    except OSError as error:
        return 127, f"{words[0]} cannot be started: {error.strerror}"
    try:
        said, complaint = asked.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(asked.pid, signal.SIGKILL)
        asked.communicate()
        return 124, f"{words[0]} did not answer in {SECONDS:g} s"
    if asked.returncode:
        return asked.returncode, (complaint.strip() or f"{words[0]} failed").splitlines()[-1]
    return 0, (said + complaint).strip()
