"""What Slurm's commands answer, in one sentence; tests/slurm asks a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from asft_nemo.config.schema import ClusterConfig
from asft_nemo.errors import UserError
from asft_nemo.launching import slurm


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are found before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, name: str, body: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "said", ["allocation failure: Requested node", "sbatch: error: allocation failure: Requested node"]
)
def test_what_sbatch_refuses_is_said_with_and_without_its_name(commands: Path, said: str) -> None:
    program(commands, "sbatch", f"echo '{said}' >&2; exit 1")
    with pytest.raises(UserError, match=r"refuses train\.sh: (error: )?allocation failure: Requested node$"):
        slurm.test_only(commands / "train.sh")


def test_no_cluster_behind_the_commands_is_said_first(commands: Path) -> None:
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        program(commands, name)
    program(commands, "sinfo", "echo 'sinfo: fatal: no configuration source' >&2; exit 1")
    with pytest.raises(UserError, match=r"^no Slurm cluster answers here: .*\(.*no configuration source\)$"):
        slurm.check_cluster(ClusterConfig(name="ours", partition="gpu"))


def test_a_hidden_partition_is_one_of_the_cluster(commands: Path) -> None:
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        program(commands, name)
    program(commands, "sinfo", 'echo gpu; case " $* " in *" --all "*) echo hidden;; esac')
    slurm.check_cluster(ClusterConfig(name="ours", partition="hidden", cpu_partition="gpu"))
    with pytest.raises(
        UserError, match=r"cluster.partition=other is no partition .*: set one of gpu, hidden$"
    ):
        slurm.check_cluster(ClusterConfig(name="ours", partition="other"))
