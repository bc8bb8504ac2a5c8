"""When a job comes back and when it does not: real jobs of `asft launch`, whose ranks are a shell script that does as it is told.

What a rank of ours does when it hears a signal is tested in test_whole_run.py; here it is what Slurm and the batch script make of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import TINY, Cluster

# Accounts may have the end of an attempt before the next one.
_GOES_ON = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", ""}
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

# Says that it runs, waits to be asked to stop unless DOES says otherwise, leaves word and ends as DOES says.
RANK = """#!/usr/bin/env bash
touch "$RUNS/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_PROCID"
[ "$DOES" = succeed ] && exit 0
[ "$DOES" = return ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
[ -z "${ASFT_STOP_FILE:-}" ] && exec sleep 3000  # no rank: it knows no signal
trap 'asked=1' USR1 TERM
touch "$RUNS/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_PROCID-listens"
until [ -n "${asked:-}" ]; do sleep 0.2; done
[ "$SLURM_PROCID" = 0 ] && echo 'step 4' > "$ASFT_STOP_FILE"
sleep 1
[ "$DOES" = fail ] && [ "$SLURM_PROCID" = 1 ] && exit 3
exit 0
"""
# Its shell ignores both signals until the rank listens, and what is ignored at its start bash cannot listen to.
RANK_COMMAND = "env --default-signal=USR1,TERM bash"
# Behind an unquoted space srun would find the command.
SPACES = (
    'cluster.sbatch_args=["comment=two words"]',
    'cluster.srun_args=["--wait=30","--comment=two words"]',
)


class Jobs:
    """Copies of one launched job, told apart by what their ranks do.

    Args:
        cluster: where.
        launched: run.dir of a launch with the stages prepare and train, one requeue allowed.
        runs: folder in which ranks say that they run.
    """

    def __init__(self, cluster: Cluster, launched: Path, runs: Path):
        self.cluster, self.launched, self.runs = cluster, launched, runs
        record = json.loads((launched / "launch.json").read_text())
        self.stages = {job["stage"]: job for job in record["jobs"]}

    def submit(self, does: str, *, stage: str = "train") -> str:
        """One more job of a stage; its number."""
        told = {**self.cluster.environment, "DOES": does, "RUNS": str(self.runs)}
        words = ["sbatch", "--requeue", "--parsable", self.stages[stage]["batch_script"]]
        return Cluster(told, self.cluster.folder).run(*words).stdout.strip()

    def wait(self, what: str, true: Callable[[], bool]) -> None:
        self.cluster.wait_for(what, self.launched, true)

    def wait_for_ranks(self, job: str, attempt: int = 0) -> None:
        """Until all ranks of an attempt listen."""
        mine = f"{job}-{attempt}-*-listens"
        self.wait(f"ranks of {job}, attempt {attempt}", lambda: len([*self.runs.glob(mine)]) == 4)

    def ask(self, job: str) -> None:
        self.cluster.run("scancel", "--signal=USR1", job)

    def ended(self, job: str) -> list[str]:
        """How each attempt ended, once the last has."""
        self.wait(f"the end of {job}", lambda: not set(self.states(job)[-1:]) & _GOES_ON)
        return self.states(job)

    def states(self, job: str) -> list[str]:
        said = self.cluster.run("sacct", "-X", "-n", "-P", "-D", "-j", job, "-o", "State").stdout
        return [line.split()[0] for line in said.splitlines()] or [""]  # CANCELLED by 0

    def said(self, job: str) -> str:
        """What the batch script wrote."""
        (log,) = self.launched.rglob(f"sbatch_*_{job}.out")
        return log.read_text()


@pytest.fixture(scope="module")
def jobs(h100: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A launch whose first stage does not end; many jobs of its size fit the cluster at once."""
    folder = tmp_path_factory.mktemp("requeue")
    (folder / "rank.sh").write_text(RANK)
    told = {**h100.environment, "DOES": "stop", "RUNS": str(folder)}
    Cluster(told, h100.folder).asft(
        *("launch", *TINY, "--stages=prepare,train", f"run.dir={folder}/run", "cluster.max_requeues=1"),
        *("cluster.request_gpus=false", f'cluster.asft="{RANK_COMMAND} {folder}/rank.sh"', *SPACES),
    )
    yield Jobs(h100, folder / "run", folder)
    h100.run("scancel", "--user=root", code=None)


def test_a_job_asked_to_stop_comes_back_as_often_as_it_may(jobs: Jobs) -> None:
    capped, fails, cancelled = jobs.submit("stop"), jobs.submit("fail"), jobs.submit("stop")
    succeeds = jobs.submit("succeed")
    for job in (capped, fails, cancelled):
        jobs.wait_for_ranks(job)
    jobs.ask(capped)
    jobs.ask(capped)  # twice: it stops once
    jobs.ask(fails)
    jobs.cluster.run("scancel", cancelled)

    assert jobs.ended(succeeds) == ["COMPLETED"]
    assert "stopped" not in jobs.said(succeeds)
    assert jobs.ended(fails) == ["FAILED"], "one rank failed, though another left word"
    assert "asft: stage train failed with exit code 3" in jobs.said(fails)
    assert jobs.ended(cancelled) == ["CANCELLED"], (
        "its ranks stopped behind a checkpoint, and it is not requeued"
    )
    assert "stopped behind step 4, and the job is not put back" in jobs.said(cancelled)

    jobs.wait_for_ranks(capped, attempt=1)
    jobs.ask(capped)
    assert jobs.ended(capped) == ["REQUEUED", "FAILED"]
    said = jobs.said(capped)
    assert said.count("stopped behind step 4; the job goes back to the queue") == 1
    assert "not put back into the queue: it came back cluster.max_requeues=1 times" in said


def test_cancel_ends_the_jobs_for_good_and_those_that_wait_for_them(jobs: Jobs) -> None:
    cluster, folder = jobs.cluster, jobs.launched
    states = cluster.status(folder)
    assert [stage["state"] for stage in states.values()] == ["RUNNING", "PENDING"]
    again = cluster.asft("launch", *TINY, f"run.dir={folder}", code=2)
    assert "belongs to jobs that wait or run" in again.stderr
    cluster.asft("cancel", str(folder))
    states = cluster.wait(folder)
    assert [stage["state"] for stage in states.values()] == ["CANCELLED", "CANCELLED"]
    assert "no job of this run waits or runs" in cluster.asft("cancel", str(folder)).stdout


def test_a_preempted_job_and_one_that_lost_a_node_come_back(jobs: Jobs) -> None:
    preempted, no_ranks = jobs.submit("return"), jobs.submit("return", stage="prepare")
    jobs.wait_for_ranks(preempted)
    jobs.wait("a stage without ranks", lambda: (jobs.runs / f"{no_ranks}-0-0").exists())
    urgent = jobs.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--account=asft", "--nodes=4", "--exclusive"),
        *("--output=/dev/null", "--wrap", "sleep 1"),
    ).stdout.strip()
    assert jobs.ended(urgent) == ["COMPLETED"]
    assert "stopped behind step 4; the job goes back to the queue" in jobs.said(preempted)
    assert "preempted; the job goes back to the queue" in jobs.said(no_ranks)

    lost = jobs.submit("return")
    jobs.wait_for_ranks(lost)
    node = jobs.cluster.run("squeue", "--noheader", "--job", lost, "--format=%B").stdout.strip()
    jobs.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    jobs.wait("a job that Slurm requeues", lambda: jobs.states(lost)[0] != "RUNNING")
    jobs.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", code=None)  # it may be back
    for job in (preempted, no_ranks, lost):
        assert jobs.ended(job)[-1] == "COMPLETED"
        assert len(jobs.states(job)) == 2
