"""A real Slurm for the tests of this folder; they are skipped where none is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import TINY, TOOL, Cluster

# Two sessions of tests on one machine are in nobody's way, nor are connections, whose ports Linux takes from 32768 on.
PORT = 19000 + 60 * (os.getpid() % 200)
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def started(folder: Path, **shape: int) -> Iterator[Cluster]:
    """A sandbox of a shape of its own, until the block ends."""
    if os.environ.get("ASFT_SLURM_TESTS") != "1":
        installed = shutil.which("slurmctld", path=PATH) is not None
        why = "they take minutes" if installed else "Slurm is not installed"
        pytest.skip(
            f"{why}: make test-slurm runs them{'' if installed else ', and installs it (Debian, root)'}"
        )
    settings = {f"SLURM_SANDBOX_{name.upper()}": str(value) for name, value in shape.items()}
    environment = {**os.environ, **settings, "PATH": PATH, "SLURM_SANDBOX_DIR": str(folder)}
    try:
        done = subprocess.run([TOOL, "start"], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        yield Cluster({**environment, "SLURM_CONF": str(folder / "slurm.conf")}, folder)
    finally:
        subprocess.run([TOOL, "stop"], env=environment, timeout=300, check=True)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two fake GPUs."""
    with started(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2, port=PORT) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes that say of themselves what H100 nodes do: 8 GPUs, 112 cores, 2 TB."""
    shape = {"nodes": 4, "gpus": 8, "cpus": 112, "memory_mb": 2_000_000, "port": PORT + 30}
    with started(tmp_path_factory.mktemp("h100"), **shape) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def whole_run(sandbox: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of a run that nothing interrupts, submitted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    sandbox.asft("launch", *TINY, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _whole_run_first(request: pytest.FixtureRequest) -> None:
    """It takes minutes of both cores: the other tests, which mostly wait, run meanwhile, on the other Slurm."""
    wanted = any("whole_run" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if wanted and os.environ.get("ASFT_SLURM_TESTS") == "1":
        request.getfixturevalue("whole_run")
