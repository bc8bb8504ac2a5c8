"""A Slurm cluster as the tests use it: `asft` on its login node, and Slurm's own commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "slurm_sandbox"
SECONDS = 600.0
TINY = (
    "experiment=tiny",
    "cluster=slurm_sandbox",
)  # a whole run: two data-parallel and two tensor-parallel ranks
STEPS = 8  # of it
_TIMED = re.compile("second|tflops|mfu")
_GOES_ON = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "UNKNOWN"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Cluster:
    """A running sandbox.

    Attributes:
        environment: of commands on its login node.
        folder: of its own files.
    """

    environment: dict[str, str]
    folder: Path

    def run(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """A command on the login node; its exit code must be `code` where one is given."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "eval"), self.environment.get("PYTHONPATH", "")])
        environment = {**self.environment, "PYTHONPATH": path}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert code is None or done.returncode == code, (
            f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def asft(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """An `asft` command."""
        return self.run(sys.executable, "-m", "asft_nemo", *words, code=code)

    def status(self, run_dir: Path) -> dict[str, dict[str, Any]]:
        """What `asft status` says, by stage."""
        found = json.loads(self.asft("status", str(run_dir), "--json").stdout)
        return {stage["stage"]: stage for stage in found["stages"]}

    def jobs(self, run_dir: Path) -> dict[str, str]:
        """Job id by stage, of the latest launch."""
        record = json.loads((run_dir / "launch.json").read_text())
        return {job["stage"]: job["job_id"] for job in record["jobs"]}

    def wait_for(self, what: str, run_dir: Path, true: Callable[[], bool], *, pause: float = 0.5) -> None:
        """Waits until something is true; the logs of the run tell why it is not."""
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come true:\n{self.logs(run_dir)}"
            time.sleep(pause)

    def wait(self, run_dir: Path) -> dict[str, dict[str, Any]]:
        """Waits until every job has ended; their states."""
        ids = ",".join(self.jobs(run_dir).values())

        def ended() -> bool:
            done = self.run("squeue", "--noheader", "--states=all", "--job", ids, "--format=%T")
            return not _GOES_ON & set(done.stdout.split())

        def accounted() -> bool:  # the controller knows it before the accounts do
            return not _GOES_ON & {stage["state"] for stage in self.status(run_dir).values()}

        self.wait_for("the end of all jobs", run_dir, ended)
        self.wait_for("the end of all jobs in the accounts", run_dir, accounted)
        return self.status(run_dir)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Waits until training has gone through `step`; it must not end before."""
        train = self.jobs(run_dir)["train"]

        def there() -> bool:
            states = self.run(
                "squeue", "--noheader", "--states=all", "--job", train, "--format=%T"
            ).stdout.split()
            assert not set(states) & set(ENDED), f"training ended:\n{self.logs(run_dir)}"
            return len(metrics(run_dir)) >= step

        self.wait_for(f"step {step}", run_dir, there)

    def logs(self, run_dir: Path) -> str:
        """The ends of all logs of a run."""
        files = sorted(
            run_dir.glob("launch/experiments/asft/*/*/*.out"), key=lambda file: file.stat().st_mtime
        )
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run, without what depends on the machine's speed."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half written
    steps = [json.loads(line) for line in whole]
    return [{key: value for key, value in step.items() if not _TIMED.search(key)} for step in steps]
