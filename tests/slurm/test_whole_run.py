"""`asft launch` on a real Slurm of two nodes x two ranks.

One run goes through all stages and nothing interrupts it. Another is told to stop, comes back, loses a rank, fails, and is launched again:
its steps must be those of the first, number for number.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from cluster import STEPS, Cluster, metrics

pytestmark = [pytest.mark.slurm, pytest.mark.nemo, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def straight(sandbox: Cluster, whole_run: Path) -> Path:
    """All stages, submitted once; they have ended."""
    sandbox.wait(whole_run)
    return whole_run


def test_all_stages_end_in_a_comparison(sandbox: Cluster, straight: Path) -> None:
    states = sandbox.status(straight)
    assert {stage["state"] for stage in states.values()} == {"COMPLETED"}, sandbox.logs(straight)
    assert list(states) == "prepare import cache-reference train export verify eval compare".split()  # noqa: SIM905
    (comparison,) = straight.glob(f"compare/step_{STEPS}/comparison.json")
    assert set(json.loads(comparison.read_text())["results"]) == {"base", "asft"}
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))
    assert metrics(straight)[-1]["kl"] > 0


def test_a_run_that_is_stopped_and_killed_has_the_numbers_of_one_that_is_not(
    sandbox: Cluster, words: list[str], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cache = f"reference.cache_dir={straight / 'reference_cache'}"
    mine = [*words, cache, "trainer.checkpoint_every=4", f"run.dir={folder}"]
    sandbox.asft("launch", *mine, "--stages=train,export")
    job = sandbox.jobs(folder)["train"]

    sandbox.wait_for_step(folder, 1)
    sandbox.run("scancel", "--signal=USR1", job)
    requeued = lambda: attempts(sandbox, job)[0] == "REQUEUED"  # noqa: E731
    sandbox.wait_for("a job that goes back to the queue", folder, requeued)
    (stopped_behind,) = (int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*"))
    assert stopped_behind < 5

    sandbox.wait_for_step(folder, 5)  # behind the checkpoint of step 4
    os.kill(_a_rank(folder), signal.SIGKILL)
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
    assert metrics(folder) == metrics(straight)


def attempts(sandbox: Cluster, job: str) -> list[str]:
    """How each attempt of a job ended, in order."""
    return sandbox.run("sacct", "-X", "-n", "-P", "-D", "-j", job, "-o", "State").stdout.split()


def _a_rank(folder: Path) -> int:
    """The process of a rank other than rank 0 of the run."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has gone
            continue
        if b"train" in command and f"run.dir={folder}".encode() in command and b"SLURM_PROCID=3" in variables:
            return int(entry.name)
    raise AssertionError(f"no rank 3 of {folder} runs")
