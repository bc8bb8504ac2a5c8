"""A real Slurm for the tests of this folder; they are skipped where none is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import STEPS, TOOL, Cluster

PORT = 30000 + 100 * (os.getpid() % 200)  # two sessions of tests on one machine are in nobody's way
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
        done = subprocess.run([TOOL, "start"], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        yield Cluster({**environment, "SLURM_CONF": str(folder / "slurm.conf")}, folder)
    finally:
        subprocess.run([TOOL, "stop"], env=environment, timeout=120, check=True)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two fake GPUs."""
    with started(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2, port=PORT) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes that say of themselves what H100 nodes do: 8 GPUs, 112 cores, 2 TB."""
    shape = {"nodes": 4, "gpus": 8, "cpus": 112, "memory_mb": 2_000_000, "port": PORT + 50}
    with started(tmp_path_factory.mktemp("h100"), **shape) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of whole runs but their folder: small data, two data-parallel and two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("data")
    sums = [(i, j) for i in range(12) for j in range(8)]
    rows = [{"question": f"What is {i} + {j}?", "answer": f"It is {i + j}. #### {i + j}"} for i, j in sums]
    tests = [{"prompt": "What is 1 + 1?", "answer": "2"}, {"prompt": "What is 2 + 1?", "answer": "3"}]
    for name, lines in (("train", rows), ("suite", tests)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return [
        *("experiment=tiny_gsm8k", "cluster=slurm_sandbox", "run.world_size=4", "parallel.tp_size=2"),
        *(f"data.train=[{folder}/train.jsonl]", "data.sequence_length=256", f"trainer.max_steps={STEPS}"),
        *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "reference=cached"),
        *(f"eval.suites=[{folder}/suite.jsonl]", "eval.max_tokens=4"),
    ]


@pytest.fixture(scope="session")
def whole_run(sandbox: Cluster, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of a run that nothing interrupts, submitted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    sandbox.asft("launch", *words, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _whole_run_first(request: pytest.FixtureRequest) -> None:
    """It takes minutes of both cores: the other tests, which mostly wait, run meanwhile, on the other Slurm."""
    wanted = any("whole_run" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if wanted and os.environ.get("ASFT_SLURM_TESTS") == "1":
        request.getfixturevalue("whole_run")
