"""Chains of the fault campaign: a lost or changed row, a clock that is obeyed, and a run that nobody disturbed are found; nothing outlives a campaign."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch

from asft_nemo.config.paths import project_dir
from asft_nemo.reference.cache_store import CacheIdentity, CacheWriter, open_or_create

sys.path.insert(0, str(project_dir() / "tools"))

from fault_campaign import CHAINS
from faults.artefacts import Undisturbed
from faults.cache_chain import CacheChain
from faults.cached import rows_of
from faults.chain import MOMENTS, Chain, Disturbance
from faults.checks import Check
from faults.kills import WORK, Kill, try_kill
from faults.processes import wait_for_end
from faults.rows import SAME, VIOLATION
from faults.yard import Yard

IDENTITY = CacheIdentity(
    **dict.fromkeys(("base", "tokenizer", "template", "data"), "x"),
    sequence_length=8,
    hidden_size=4,
    vocab_size=16,
    num_samples=3,
    dtype="fp32",
    precision="fp32",
)
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    yard = Yard(tmp_path)
    yard.here.mkdir()
    yard.pristine.mkdir()
    (yard.here / "run").mkdir()
    return yard


def by_the_wall(here: Path) -> int:
    (here / "out").write_text(str(abs(time.time() - time.time()) < 60))
    return 0


def by_nanoseconds(here: Path) -> int:
    (here / "out").write_text(str(abs(time.time_ns() - time.time_ns()) < 60e9))
    return 0


def by_the_calendar(here: Path) -> int:
    (here / "out").write_text(str(abs((datetime.now() - datetime.now()).total_seconds()) < 60))
    return 0


def by_what_measures(here: Path) -> int:
    (here / "out").write_text(str(abs(time.monotonic() - time.monotonic()) < 60))
    return 0


@pytest.mark.parametrize(
    ("tool", "outcome"),
    [
        (by_the_wall, VIOLATION),
        (by_nanoseconds, VIOLATION),
        (by_the_calendar, VIOLATION),
        (by_what_measures, SAME),
    ],
)
def test_a_tool_that_obeys_the_clock_is_found(
    tool: Callable[[Path], int], outcome: str, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("a tool", lambda yard: lambda: tool(yard.here), ("out",))
    monkeypatch.setitem(WORK, "tool", check)
    row = try_kill(Kill("clock:tool", "tool", "clock"), yard, Undisturbed(yard), seed=0)
    assert (row.outcome, row.name, row.kind) == (outcome, "clock:tool", "clock jumps by hours")


def test_a_clock_that_jumps_stays_in_its_process(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORK, "tool", Check("a tool", lambda yard: lambda: by_the_wall(yard.here), ("out",)))
    try_kill(Kill("clock:tool", "tool", "clock"), yard, Undisturbed(yard), seed=0)
    assert abs(time.time() - time.time()) < 60


def cache_of(directory: Path, rows: dict[int, float]) -> None:
    """A finished cache whose examples have two rows of these numbers."""
    open_or_create(directory, IDENTITY, written_by={})
    with CacheWriter(directory, 0, IDENTITY) as writer:
        for sample, value in rows.items():
            writer.add(sample, [0, 2], torch.full((2, IDENTITY.hidden_size), value))


ROWS = {0: 1.0, 1: 2.0, 2: 3.0}


@pytest.fixture
def chain(yard: Yard) -> CacheChain:
    """A disturbed job, and the undisturbed one's cache."""
    chain = CacheChain(yard, seed=0, number=5)
    cache_of(yard.here / "usual", ROWS)
    chain.undisturbed = lambda: rows_of(yard.here / "usual")
    return chain


def test_a_cache_with_the_same_rows_is_not_accused(chain: CacheChain, yard: Yard) -> None:
    """In whatever order, and in however many files."""
    cache_of(yard.here / "chain5_cache", {2: 3.0})
    assert chain.saved_is_whole() == ""
    cache_of(yard.here / "chain5_cache", {1: 2.0, 0: 1.0})
    assert (chain.saved_is_whole(), chain.as_undisturbed()) == ("", "")


def test_a_row_that_is_missing_or_another_is_found(chain: CacheChain, yard: Yard) -> None:
    cache_of(yard.here / "chain5_cache", {0: 1.0, 1: 2.0})
    assert chain.saved_is_whole() == ""
    assert chain.as_undisturbed() == "the cache has 2 of 3 examples, or other rows than undisturbed"
    cache_of(yard.here / "chain5_cache", {2: 4.0})
    assert chain.saved_is_whole() == "the cache has a row that is not as undisturbed"
    assert chain.as_undisturbed() != ""


def test_a_finished_file_of_a_cache_that_goes_is_found(chain: CacheChain, yard: Yard) -> None:
    """Though the job would compute it again."""
    cache_of(yard.here / "chain5_cache", ROWS)
    assert chain.saved_is_whole() == ""
    (file,) = (yard.here / "chain5_cache").glob("rows-*.safetensors")
    file.unlink()
    assert chain.saved_is_whole() == f"{file.name} was finished, and is gone"


def test_a_run_that_ended_before_is_no_fault_that_was_survived(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(yard, seed=0, number=0)
    monkeypatch.setattr(chain, "_start", lambda **_: subprocess.Popen(["true"]))
    row = next(chain.disturb((Disturbance("training", "rank 0", "SIGKILL"),)))
    assert (row.outcome, row.problem) == (VIOLATION, "it had ended before it could be disturbed")


def test_first_bytes_of_a_cache_are_seen(yard: Yard) -> None:
    run, cache = yard.here / "chain5", yard.here / "chain5_cache"
    cache.mkdir()
    partial = cache / "rows-00000-000000-00000000.safetensors.partial"
    partial.write_text("of an earlier start")
    since = partial.stat().st_mtime_ns
    assert not MOMENTS["cache"].reached(run, 0, since + 10**9)
    assert MOMENTS["cache"].reached(run, 0, since - 10**9)


def test_what_a_killed_campaign_started_ends_with_it(tmp_path: Path) -> None:
    """A launcher that trains on would take the machine, and write where the next campaign does."""
    words = (
        "import os, subprocess, sys, time\n"
        f"sys.path.insert(0, {str(project_dir() / 'tools')!r})\n"
        "from faults.processes import end_with\n"
        "me = os.getpid()\n"
        "child = subprocess.Popen(['sleep', '50'], start_new_session=True, preexec_fn=lambda: end_with(me))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(50)\n"
    )
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True) as campaign:
        assert campaign.stdout is not None
        child = psutil.Process(int(campaign.stdout.readline()))
        assert child.is_running()
        campaign.kill()
    assert wait_for_end([child], 10) == []


def test_chains_have_names_of_their_own() -> None:
    names = [one.name(n, place) for n, chain in enumerate(CHAINS) for place, one in enumerate(chain)]
    assert len(set(names)) == len(names)
    assert {one.moment for chain in CHAINS for one in chain} == set(MOMENTS)
