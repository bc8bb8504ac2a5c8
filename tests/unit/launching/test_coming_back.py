"""Whether a job that stopped for a signal goes back to the queue: the batch script's own lines in a shell, among programs that play Slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from asft_nemo.config.schema import ClusterConfig
from asft_nemo.launching.scripts import STOPPED_EXIT, batch_setup
from asft_nemo.launching.stages import Stage


@pytest.mark.parametrize(
    ("words", "requeued"),
    [
        (["step 5"], True),
        (["step 5", "step 5"], True),
        (["step 5", "step 5", "step 5"], False),
        (["step 5", "step 5", "step 6"], True),
        (["step 4", "step 5", "step 5"], True),
        (["step 5", None, "step 5"], True),  # Slurm itself requeued the one between: it may have been a node
        ([None, "step 4", "step 5", "step 5", "step 5"], False),
    ],
)
def test_two_attempts_for_nothing_are_enough(words: list[str | None], requeued: bool, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    for attempt, word in enumerate(words):
        if word is not None:
            (tmp_path / "launch" / f"stopped-7-{attempt}").write_text(f"{word}\n")
    for name, body in {"squeue": "echo RUNNING", "scontrol": f'echo "$*" >> {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    lines = batch_setup(Stage("train", (), ranks=True), ClusterConfig(), folder=tmp_path, log="/log")
    done = subprocess.run(
        ["bash", "-c", f"{lines}\ntrue"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == requeued
    assert done.returncode == (0 if requeued else STOPPED_EXIT)
    assert ("stopped behind step 5 like the two attempts before" in done.stderr) != requeued
