"""`asft launch` on a real Slurm of two nodes x two ranks.

One run goes through all stages and nothing interrupts it. Another, which begins when that one has trained, is told to stop while it writes a
checkpoint, comes back, loses a rank, fails, and is launched again: its steps must be those of the first, number for number.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from cluster import STEPS, TINY, Cluster, metrics

from asft_nemo.launching.settings import settings_file

pytestmark = [pytest.mark.slurm, pytest.mark.nemo, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_that_is_stopped_and_killed_has_the_numbers_of_one_that_is_not(
    sandbox: Cluster, whole_run: Path, tmp_path: Path
) -> None:
    straight = sandbox.jobs(whole_run)["train"]
    trained = lambda: attempts(sandbox, straight)[:1] not in ([], ["PENDING"], ["RUNNING"])  # noqa: E731
    sandbox.wait_for("the training that nothing interrupts", whole_run, trained)
    assert attempts(sandbox, straight) == ["COMPLETED"], sandbox.logs(whole_run)
    folder = tmp_path / "run"
    cache = f"reference.cache_dir={whole_run / 'reference_cache'}"
    # without GPUs: the other run's evaluation has one meanwhile
    mine = [*TINY, cache, f"run.dir={folder}", "cluster.request_gpus=false"]
    sandbox.asft("launch", *mine, "trainer.checkpoint_every=2", "--stages=train,export")
    job = sandbox.jobs(folder)["train"]

    sandbox.wait_for("rank 3", folder, lambda: len(_rank_3(folder)) == 1)
    (held,) = _rank_3(folder)
    writing = folder / "checkpoints" / "partial_step_2"
    sandbox.wait_for("a checkpoint that is being written", folder, writing.exists, pause=0.01)
    os.kill(
        held, signal.SIGSTOP
    )  # no checkpoint is whole without all ranks: the signals come while it is being written
    try:
        for name in ("TERM", "USR1"):  # its helper processes get them, too
            sandbox.run("scancel", f"--signal={name}", job)
        time.sleep(2.0)  # scancel only hands them over
        assert writing.exists()
    finally:
        os.kill(held, signal.SIGCONT)
    requeued = lambda: attempts(sandbox, job)[0] == "REQUEUED"  # noqa: E731
    sandbox.wait_for("a job that goes back to the queue", folder, requeued)
    assert [path.name for path in folder.glob("checkpoints/*step_*")] == ["step_2"]

    sandbox.wait_for_step(folder, 3)
    (rank,) = _rank_3(folder)
    os.kill(rank, signal.SIGKILL)
    states = sandbox.wait(folder)
    assert attempts(sandbox, job) == ["REQUEUED", "FAILED"]  # and does not come back
    assert states["export"]["state"] == "CANCELLED"  # it would wait for ever
    log = states["train"]["log"]
    assert Path(log).name.endswith(f"train_{job}_1.out")
    assert re.search(
        rf"asft: stage train failed with exit code \d+: see {re.escape(log)}", sandbox.logs(folder)
    )
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists()

    refused = sandbox.asft("launch", *mine, "--stages=train", code=2).stderr
    assert f"run.dir={folder} holds another run" in refused
    sandbox.asft("launch", *mine, "trainer.resume=must", "--stages=train")
    assert sandbox.wait(folder)["train"]["state"] == "COMPLETED", sandbox.logs(folder)
    assert metrics(folder) == metrics(whole_run)
    assert not [*folder.glob("checkpoints/partial_*")]


def test_all_stages_end_in_a_comparison(sandbox: Cluster, whole_run: Path) -> None:
    states = sandbox.wait(whole_run)
    assert {stage["state"] for stage in states.values()} == {"COMPLETED"}, sandbox.logs(whole_run)
    assert list(states) == "prepare import cache-reference train export verify eval compare".split()  # noqa: SIM905
    (comparison,) = whole_run.glob(f"compare/step_{STEPS}/comparison.json")
    assert set(json.loads(comparison.read_text())["results"]) == {"base", "asft"}
    assert [line["step"] for line in metrics(whole_run)] == list(range(1, STEPS + 1))
    assert metrics(whole_run)[-1]["kl"] > 0


def attempts(sandbox: Cluster, job: str) -> list[str]:
    """How each attempt of a job ended, in order."""
    return sandbox.run("sacct", "-X", "-n", "-P", "-D", "-j", job, "-o", "State").stdout.split()


def _rank_3(folder: Path) -> list[int]:
    """The process of the run's last rank where it runs; its helpers are forks of it, with its command and environment."""
    found: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has gone
            continue
        mine = str(settings_file(folder)).encode() in command
        if mine and b"train" in command and b"SLURM_PROCID=3" in variables:
            found[int(entry.name)] = parent
    return [pid for pid, parent in found.items() if parent not in found]
