"""How many threads a rank of Slurm computes with."""

from __future__ import annotations

import pytest

from asft_nemo.slurm_ranks import _cores


@pytest.mark.parametrize(
    ("variables", "bound", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 14, 14),  # bound to what was asked for
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 112, 14),  # a cluster that binds nobody
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 7, 7),
        ({"SLURM_CPUS_ON_NODE": "112"}, 112, 14),  # all ranks share the node
        ({"SLURM_CPUS_ON_NODE": "112"}, 14, 14),  # bound by the cluster itself
        ({"SLURM_CPUS_ON_NODE": "8"}, 1, 1),
        ({}, 112, 14),
        ({}, 4, 1),
    ],
)
def test_cores_are_divided_among_ranks_once(variables: dict[str, str], bound: int, cores: int) -> None:
    assert _cores({"LOCAL_WORLD_SIZE": "8", **variables}, bound=bound) == cores
