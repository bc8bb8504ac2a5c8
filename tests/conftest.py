"""What all tests share: groups of ranks that live for the whole session, the folder of real data, a guard for commands."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from ranks import RankGroup  # noqa: E402

# Hypothesis would fail an example that takes 0.2 s, which on a busy machine any may, and would try others each time: a test that passes here passes
# everywhere. `--hypothesis-profile=search` looks for new ones.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankGroup]:
    """Four gloo ranks."""
    group = RankGroup(4)
    yield group
    group.close()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankGroup]:
    """Two gloo ranks."""
    group = RankGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of published data sets: ``ASFT_DATA_DIR``, by default ../shared/data. Skips where it is absent."""
    folder = Path(os.environ.get("ASFT_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set ASFT_DATA_DIR")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "asft-tests", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to mount a file system: {made.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def keep_logging_and_warnings() -> Iterator[None]:
    """The command sets up logging and warning filters for its whole process; here it is only a guest."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(level)
