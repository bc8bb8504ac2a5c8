"""A tiny model that asft exported, what transformers says of it, and vLLM in an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_questions import KEY, SECONDS, SERVED

from asft_nemo import cli

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python that has vLLM."""
    python = os.environ.get("ASFT_VLLM_PYTHON")
    if python is None:
        pytest.skip(
            "vLLM is in an environment of its own, and starting it takes minutes: make test-vllm runs them"
        )
    return Path(python)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of vLLM's processes: our packages from the tree, nothing from a hub, a small cache, nothing compiled."""
    ours = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}:{HERE}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return {**os.environ, **ours, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def exported(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """assets/tiny-base as a NeMo checkpoint and back."""
    folder = tmp_path_factory.mktemp("exported")
    assert cli.main(["import", str(ROOT / "assets" / "tiny-base"), str(folder / "nemo")]) == 0
    assert cli.main(["export", str(folder / "nemo"), str(folder / "hf")]) == 0
    return folder / "hf"


@pytest.fixture(scope="session")
def answers(
    vllm_python: Path, exported: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the backend `vllm` answers; see worker.py."""
    out = tmp_path_factory.mktemp("answers") / "answers.json"
    words = [str(vllm_python), str(HERE / "worker.py"), str(exported), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "", "stdout belongs to results"
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def base_url(
    vllm_python: Path, exported: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`vllm serve`, which knows the model by its directory and by a name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        str(vllm_python.with_name("vllm")),
        "serve",
        str(exported),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    words += [
        "--served-model-name",
        str(exported),
        SERVED,
        "--api-key",
        KEY,
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + SECONDS
        while not _healthy(port):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
