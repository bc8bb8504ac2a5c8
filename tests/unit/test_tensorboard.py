"""The command that the documentation names shows a run's events: TensorBoard starts with the versions that are pinned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def test_tensorboard_starts_and_finds_a_runs_events(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "runs" / "a" / "tensorboard")) as events:
        events.add_scalar("nll", 1.5, 1)
    # --inspect: what `tensorboard --logdir runs` would show, without its server
    said = subprocess.run(
        [Path(sys.executable).with_name("tensorboard"), "--logdir", "runs", "--inspect"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert said.returncode == 0, said.stderr
    assert "runs/a/tensorboard" in said.stdout
    assert "nll" in said.stdout
