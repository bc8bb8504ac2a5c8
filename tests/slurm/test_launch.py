"""`asft launch` on a real Slurm of two nodes x two ranks, through interruptions.

One run goes through all stages and is stopped by a signal in the middle of training; a second loses a rank, fails, and is resumed. Their
steps must be those of a third that nothing interrupted, number for number.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster, metrics

pytestmark = [pytest.mark.slurm, pytest.mark.nemo, pytest.mark.slow, pytest.mark.timeout(480)]

STEPS = 12


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of all runs of this module but their folder: small data, two data-parallel and two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"What is {i} + {j}?", "answer": f"It is {i + j}. #### {i + j}"}
        for i in range(12)
        for j in range(8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.jsonl").write_text(
        '{"prompt": "What is 1 + 1?", "answer": "2"}\n{"prompt": "What is 2 + 1?", "answer": "3"}\n'
    )
    return [
        *("experiment=tiny_gsm8k", "cluster=slurm_sandbox", "run.world_size=4", "parallel.tp_size=2"),
        *(f"data.train=[{folder}/train.jsonl]", "data.sequence_length=256", f"trainer.max_steps={STEPS}"),
        *("trainer.global_batch_size=8", "trainer.micro_batch_size=2", "trainer.checkpoint_every=4"),
        *(f"eval.suites=[{folder}/suite.jsonl]", "eval.max_tokens=4"),
    ]


@pytest.fixture(scope="module")
def stopped(sandbox: Cluster, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages; in training, the ranks of one node are told to stop, and the job comes back."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    sandbox.asft("launch", *words, "reference=cached", f"run.dir={folder}")
    sandbox.wait_for_step(folder, 2)
    sandbox.run("scancel", "--signal=USR1", sandbox.jobs(folder)["train"])
    return folder


def test_a_signal_requeues_and_all_stages_end_in_a_comparison(sandbox: Cluster, stopped: Path) -> None:
    states = sandbox.wait(stopped)
    assert {stage["state"] for stage in states.values()} == {"COMPLETED"}, sandbox.logs(stopped)
    assert list(states) == "prepare import cache-reference train export verify eval compare".split()  # noqa: SIM905
    restarts = sandbox.run(
        "sacct", "-X", "-n", "-P", "-D", "-j", states["train"]["job_id"], "-o", "State"
    ).stdout.split()
    assert restarts == ["REQUEUED", "COMPLETED"]
    (comparison,) = stopped.glob(f"compare/step_{STEPS}/comparison.json")
    assert set(json.loads(comparison.read_text())["results"]) == {"base", "asft"}
    assert [line["step"] for line in metrics(stopped)] == list(range(1, STEPS + 1))


def test_a_killed_rank_fails_the_job_then_resumes_to_the_same_numbers(
    sandbox: Cluster, words: list[str], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    mine = [
        *words,
        "reference=cached",
        f"reference.cache_dir={stopped / 'reference_cache'}",
        f"run.dir={folder}",
    ]
    sandbox.wait(stopped)  # its cache is whole, and the nodes are free
    sandbox.asft("launch", *mine, "--stages=train,export")
    sandbox.wait_for_step(folder, 5)  # behind the checkpoint of step 4
    os.kill(_a_rank(folder), signal.SIGKILL)
    states = sandbox.wait(folder)
    assert states["train"]["state"] == "FAILED"
    assert states["export"]["state"] == "CANCELLED"  # it would wait for ever
    assert Path(states["train"]["log"]).parent.name == "train"
    assert states["train"]["log"] in sandbox.logs(folder)  # the batch script names it, too
    assert not list(folder.glob("checkpoints/step_12"))
    refused = sandbox.asft("launch", *mine, "--stages=train", code=2).stderr
    assert f"run.dir={folder} holds another run" in refused
    sandbox.asft("launch", *mine, "--stages=train", "trainer.resume=must")
    assert sandbox.wait(folder)["train"]["state"] == "COMPLETED", sandbox.logs(folder)
    assert metrics(folder) == metrics(stopped)


def test_uninterrupted_training_has_the_same_numbers(
    sandbox: Cluster, words: list[str], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    mine = [
        *words,
        f"reference.cache_dir={stopped / 'reference_cache'}",
        "reference=cached",
        f"run.dir={folder}",
    ]
    sandbox.asft("launch", *mine, "--stages=train")
    assert sandbox.wait(folder)["train"]["state"] == "COMPLETED", sandbox.logs(folder)
    assert metrics(folder) == metrics(stopped)


def test_cancel_ends_the_jobs_for_good(sandbox: Cluster, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sandbox.asft("launch", *words, f"run.dir={folder}", "--stages=train,export")
    job = sandbox.jobs(folder)["train"]
    running = lambda: sandbox.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip() == "RUNNING"  # noqa: E731
    sandbox.wait_for("a running job", folder, running)
    assert (
        "belongs to jobs that wait or run"
        in sandbox.asft("launch", *words, f"run.dir={folder}", code=2).stderr
    )
    sandbox.asft("cancel", str(folder))
    states = sandbox.wait(folder)
    assert {stage["state"] for stage in states.values()} == {"CANCELLED"}
    assert "no job of this run waits or runs" in sandbox.asft("cancel", str(folder)).stdout


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
