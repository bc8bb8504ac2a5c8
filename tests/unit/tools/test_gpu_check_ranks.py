"""The GPU check's ranks, as processes of their own: results, errors, ends and hangs, each with the rank named; collectives between two."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from bench import gpu_collectives, gpu_ranks
from bench.gpu_cluster import check_collectives
from bench.gpu_parts import Check
from bench.gpu_ranks import RankFailed, Ranks
from faults.processes import wait_for_end

pytestmark = [pytest.mark.multiproc]

JOBS = """
import os, signal, time
from bench.gpu_rank import at

def ranks(more):
    return [int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["ASFT_DEVICE"], more]

def fail(rank):
    if int(os.environ["RANK"]) == rank:
        raise ValueError("one line\\nanother")
    time.sleep(60)

def die():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def hang():
    at("the door")
    if os.environ["RANK"] == "0":
        at("the garden")
    time.sleep(60)

def parent():
    return os.getppid(), os.getpid()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "few_jobs.py").write_text(JOBS)
    with Ranks(2, device="cpu", paths=[folder]) as ranks:
        yield ranks


def test_jobs_are_called_on_every_rank_and_ranks_live_on(two: Ranks) -> None:
    expected = [[0, 2, "cpu", {"a": 1}], [1, 2, "cpu", {"a": 1}]]
    assert two.run("few_jobs:ranks", more={"a": 1}, timeout=60) == expected
    pids = [process.pid for process in two._processes]
    assert two.run("few_jobs:parent", timeout=60) == [[os.getpid(), pid] for pid in pids]


def test_a_rank_that_fails_is_named_and_the_next_job_gets_new_ones(two: Ranks) -> None:
    before = [process.pid for process in two._processes]
    with pytest.raises(RankFailed, match=r"^rank 1: ValueError: one line$") as failed:
        two.run("few_jobs:fail", rank=1, timeout=60)
    assert "in fail" in failed.value.log
    assert two.run("few_jobs:ranks", more=0, timeout=60)[1][0] == 1
    assert not set(before) & {process.pid for process in two._processes}


def test_a_rank_that_is_killed_is_named(two: Ranks) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1: it was ended by signal 9 in few_jobs:die$"):
        two.run("few_jobs:die", timeout=60)


def test_a_hang_names_the_rank_that_is_behind_and_where_all_stand(two: Ranks) -> None:
    two.run("few_jobs:ranks", more=0, timeout=60)
    began = time.monotonic()
    with pytest.raises(RankFailed) as hung:
        two.run("few_jobs:hang", timeout=3)
    assert time.monotonic() - began < 20
    assert str(hung.value) == (
        "few_jobs:hang was not done in 3 s: rank 1 at the door (in hang, from few_jobs.py:22); rank 0, further on, at the garden "
        "(in hang, from few_jobs.py:22)"
    )


def test_collectives_of_two_ranks_are_right(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(argparse.Namespace(), "cpu", tmp_path, nproc=2)
    monkeypatch.setattr(Check, "ranks", lambda self: contextlib.nullcontext(two))
    found = check_collectives(check)
    assert found["bars"]["wrong"] == {"measured": 0, "limit": 0}
    assert len(found["rows"]) == len(gpu_collectives._OPERATIONS)
    assert all(row["right"] == "right" and row["gb_per_second"] > 0 for row in found["rows"].values())


def test_a_rank_that_does_not_come_to_a_collective_is_named(two: Ranks) -> None:
    # They have met: importing torch is no part of the 3 seconds.
    two.run("bench.gpu_collectives:collectives", sizes=[], repeats=1, device="cpu", timeout=60)
    with pytest.raises(RankFailed) as hung:
        two.run("bench.gpu_collectives:stall", rank=0, device="cpu", timeout=3)
    words = str(hung.value)
    assert words.startswith("bench.gpu_collectives:stall was not done in 3 s: rank 0 at a sleep (in stall, ")
    assert "rank 1, further on, at the second all-reduce (in all_reduce" in words


def test_a_stack_of_no_answer() -> None:
    assert gpu_ranks.code_of("") == ", which does not answer"


@pytest.mark.parametrize("seconds", [0, 1])
def test_ranks_end_with_the_process_that_started_them(seconds: float) -> None:
    """Also with one that ends before they have come up."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from bench.gpu_ranks import Ranks; ranks = Ranks(1, device='cpu'); "
        "ranks._start(); print(ranks._processes[0].pid, flush=True); time.sleep(60)"
    )
    tools = str(Path(__file__).resolve().parents[3] / "tools")
    parent = subprocess.Popen([sys.executable, "-c", code, tools], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    rank = psutil.Process(int(parent.stdout.readline()))
    time.sleep(seconds)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_for_end([rank], 30) == []
