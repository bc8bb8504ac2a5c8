"""The fault campaign finds the processes of a run while others of it come and go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from asft_nemo.config.paths import project_dir

sys.path.insert(0, str(project_dir() / "tools"))

from faults.processes import NotReached, chosen, end_all, family, wait_for_end

pytestmark = pytest.mark.timeout(60)

SLEEP = "import time; time.sleep(60)"
# Three that are named like those of a run: a torchrun, two ranks of it and a helper that has the environment of a rank.
TORCHRUN = f"""
import subprocess, sys, time
for rank, name in (("0", "asft_nemo.ranks"), ("1", "asft_nemo.ranks"), ("1", "a helper")):
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}, name], env={{"RANK": rank}})
print("started", flush=True)
time.sleep(60)
"""


class EndsWhenAsked(psutil.Process):
    """A process that ends at the moment at which it is asked for one thing."""

    asked = ""

    def _end(self, question: str) -> None:
        if question == self.asked:
            self.kill()
            self.wait()

    def environ(self) -> dict[str, str]:
        self._end("environ")
        return super().environ()

    def cmdline(self) -> list[str]:
        self._end("cmdline")
        return super().cmdline()

    def ppid(self) -> int:
        self._end("ppid")
        return super().ppid()


@pytest.fixture
def run() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", TORCHRUN, "torch.distributed.run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    end_all(process)


@pytest.fixture
def ending() -> Iterator[EndsWhenAsked]:
    """It looks like a rank otherwise."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP, "asft_nemo.ranks"], env={"RANK": "1"})
    yield EndsWhenAsked(process.pid)
    process.kill()
    process.wait()


@pytest.mark.parametrize("question", ["environ", "cmdline", "ppid"])
def test_a_process_that_ends_meanwhile_is_passed_over(
    run: subprocess.Popen[bytes], ending: EndsWhenAsked, question: str
) -> None:
    everyone = family(run)
    assert len(everyone) == 4
    ending.asked = question
    (rank,) = chosen("rank 1", [everyone[0], ending, *everyone[1:]])
    assert rank.cmdline()[-1] == "asft_nemo.ranks"
    assert rank.environ()["RANK"] == "1"
    assert not ending.is_running()


def test_torchrun_is_found_beside_a_process_that_ends(
    run: subprocess.Popen[bytes], ending: EndsWhenAsked
) -> None:
    ending.asked = "cmdline"
    assert [one.pid for one in chosen("torchrun", [ending, *family(run)])] == [run.pid]


def test_a_rank_that_has_ended_was_not_reached(run: subprocess.Popen[bytes]) -> None:
    everyone = family(run)
    (rank,) = chosen("rank 0", everyone)
    rank.kill()
    assert not wait_for_end([rank], 10)
    with pytest.raises(NotReached, match="there is no rank 0"):
        chosen("rank 0", everyone)


def test_what_has_ended_is_no_longer_waited_for(ending: EndsWhenAsked) -> None:
    ending.kill()
    assert wait_for_end([ending], 10) == []
