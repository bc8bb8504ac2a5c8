"""Lines of cluster.setup run as their authors wrote them: often with variables that nobody has set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from asft_nemo.config.schema import ClusterConfig
from asft_nemo.launching.scripts import stage_script
from asft_nemo.launching.stages import Stage


def run_stage(
    folder: Path, *setup: str, executor: str = "slurm", ranks: bool = False, command: str = "echo reached"
) -> subprocess.CompletedProcess[str]:
    """Runs the script of a stage whose only command is a stub."""
    cluster = ClusterConfig(executor=executor, setup=setup)
    (folder / "launch").mkdir(exist_ok=True)
    script = stage_script(Stage("verify", (command,), ranks=ranks), cluster, folder=folder)
    (folder / "stage.sh").write_text(script)
    unset = {name: value for name, value in os.environ.items() if name not in ("BASHRCSOURCED", "UNSET")}
    return subprocess.run(
        ["bash", str(folder / "stage.sh")],
        env=unset | {"SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(("executor", "ranks"), [("slurm", True), ("slurm", False), ("local", False)])
def test_a_sourced_file_may_read_what_nobody_has_set(tmp_path: Path, executor: str, ranks: bool) -> None:
    rc = tmp_path / "bashrc"  # as Red Hat's /etc/bashrc begins
    rc.write_text('if [ -z "$BASHRCSOURCED" ]; then\n  BASHRCSOURCED=Y\n  export FROM_SETUP=here\nfi\n')

    done = run_stage(
        tmp_path, f". '{rc}'", executor=executor, ranks=ranks, command='echo "reached with $FROM_SETUP"'
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "reached with here\n", "")


@pytest.mark.parametrize(
    "line", ["ls /nowhere/at/all", "ls /nowhere/at/all | cat", "no_such_module load cuda"]
)
def test_a_line_that_fails_still_ends_the_stage(tmp_path: Path, line: str) -> None:
    done = run_stage(tmp_path, line, "true")

    assert done.returncode != 0
    assert "reached" not in done.stdout


def test_the_commands_of_the_stage_itself_keep_to_variables_that_are_set(tmp_path: Path) -> None:
    done = run_stage(tmp_path, "true", command='echo "reached $UNSET"')

    assert done.returncode != 0
    assert "unbound variable" in done.stderr


def test_a_stage_without_such_lines_says_nothing_of_them(tmp_path: Path) -> None:
    script = stage_script(Stage("verify", ("true",)), ClusterConfig(), folder=tmp_path)

    assert "set +u" not in script
    assert script.count("set -") == 1
