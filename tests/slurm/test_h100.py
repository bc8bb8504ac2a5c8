"""The scripts of the largest run, put to a Slurm whose nodes say they are H100 nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

WORDS = [
    *("experiment=medical_qwen25_72b", "model.path=/models/Qwen2.5-72B", "data.train=[/data/medmcqa.jsonl]"),
    *("cluster=slurm", "cluster.partition=batch", "cluster.account=asft", "cluster.exclusive=true"),
    *("cluster.cpus_per_task=14", "cluster.time=2-00:00:00", "run.dir=/shared/runs/medical_72b"),
]


def test_slurm_would_start_every_stage_of_72b(h100: Cluster, tmp_path: Path) -> None:
    plan = json.loads(h100.asft("launch", *WORDS, "--dry-run", "--json").stdout)
    for stage in plan["stages"]:
        script = tmp_path / f"{stage['name']}.sh"
        script.write_text(stage["batch_script"])
        said = h100.run("sbatch", "--test-only", str(script)).stderr
        assert "to start at" in said
        if stage["name"] == "train":
            assert "n[1-4]" in said


def test_slurm_refuses_more_than_there_is(h100: Cluster, tmp_path: Path) -> None:
    more = [
        "cluster.nodes=5",
        "run.world_size=40",
        "parallel.pp_size=5",
        "parallel.vpp_size=4",
        "trainer.global_batch_size=60",
    ]
    plan = json.loads(h100.asft("launch", *WORDS, *more, "--stages=train", "--dry-run", "--json").stdout)
    script = tmp_path / "train.sh"
    script.write_text(plan["stages"][0]["batch_script"])
    assert (
        "Requested node configuration is not available"
        in h100.run("sbatch", "--test-only", str(script), code=1).stderr
    )
