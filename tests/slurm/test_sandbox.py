"""tools/slurm_sandbox is started and stopped as often as one likes, also behind a crash."""

from __future__ import annotations

import os
import signal

import pytest
from cluster import TOOL, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def daemons(cluster: Cluster) -> dict[str, int]:
    """Process ids by name."""
    return {path.stem: int(path.read_text()) for path in (cluster.folder / "run").glob("*.pid")}


def test_a_second_start_changes_nothing_and_brings_back_what_was_killed(h100: Cluster) -> None:
    before = daemons(h100)
    assert {"slurmctld", "slurmdbd", "mariadbd", "munged", "slurmd.n1", "slurmd.n4"} <= set(before)
    h100.run(str(TOOL), "start")
    assert daemons(h100) == before

    for name in ("slurmctld", "slurmd.n2"):
        os.kill(before[name], signal.SIGKILL)
    h100.run(str(TOOL), "start")
    after = daemons(h100)
    assert {name for name in before if after[name] != before[name]} == {"slurmctld", "slurmd.n2"}
    assert "asft" in h100.run("srun", "--account=asft", "--nodes=4", "--immediate=60", "echo", "asft").stdout
