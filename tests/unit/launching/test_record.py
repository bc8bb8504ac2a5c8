"""A launch has its folder for itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asft_nemo.errors import ConfigError
from asft_nemo.launching import record


def test_one_launch_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with record.claim(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"being launched by process {os.getpid()} of .*: wait for it"):
            record.claim(tmp_path / "run")
    with record.claim(tmp_path / "run"):
        pass  # what an earlier launch left is nobody's


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\): set run.dir to a folder"):
        record.claim(tmp_path / "file" / "run")
