"""What a launch is refused for by asking the cluster, before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster=slurm_sandbox", "cluster.partition=gpus"], "cluster.partition=gpus is no partition of this cluster: set one of batch, urgent"),
        (
            ["cluster=slurm_pyxis", "cluster.partition=batch", "cluster.account=asft", "cluster.container_image=a.sqsh"],
            "cluster=slurm_pyxis runs containers by pyxis, and this srun has no --container-image: set cluster=slurm",
        ),
        (
            ["cluster=slurm_sandbox", "cluster.gpus_per_node=4"],
            "the cluster refuses train_sbatch.sh: allocation failure: Requested node configuration is not available",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_submitted(
    sandbox: Cluster, words: list[str], sentence: str, tmp_path: Path
) -> None:
    given = ["experiment=tiny", f"run.dir={tmp_path}/run", *words]
    before = sandbox.run("sacct", "-n", "-X", "-o", "JobID").stdout
    assert sentence in sandbox.asft("launch", *given, "--stages=train", code=2).stderr
    assert sandbox.run("sacct", "-n", "-X", "-o", "JobID").stdout == before
    assert not (tmp_path / "run" / "launch.json").exists()
