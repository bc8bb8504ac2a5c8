"""A tiny model that asft exported, what transformers says of it, and vLLM in an environment of its own."""

from __future__ import annotations

import contextlib
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
    # Bytecode is written even where a container forbids it: compiling vLLM and torch anew takes half of each start.
    ours |= {"PYTHONDONTWRITEBYTECODE": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours}


@pytest.fixture(scope="session")
def exported(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """assets/tiny-base as a NeMo checkpoint and back."""
    folder = tmp_path_factory.mktemp("exported")
    assert cli.main(["import", str(ROOT / "assets" / "tiny-base"), str(folder / "nemo")]) == 0
    assert cli.main(["export", str(folder / "nemo"), str(folder / "hf")]) == 0
    return folder / "hf"


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions."""
    file = tmp_path_factory.mktemp("suite") / "copy.jsonl"
    rows = [{"prompt": f"copy {word}:", "answer": word} for word in ("KTAB", "AB", "XYZ")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of `asft eval` with vLLM; `answers` fills it."""
    return tmp_path_factory.mktemp("evaluated") / "vllm"


@pytest.fixture(scope="session")
def answers(
    vllm_python: Path, exported: Path, environment: dict[str, str], suite: Path, evaluated: Path
) -> dict[str, Any]:
    """What the backend `vllm` answers; see worker.py."""
    out = evaluated.parent / "answers.json"
    return asked(vllm_python, environment, exported, out, suite, evaluated)


def asked(python: Path, environment: dict[str, str], model: Path, out: Path, *more: Path) -> dict[str, Any]:
    """What worker.py writes into `out`."""
    words = [str(python), str(HERE / "worker.py"), *map(str, (model, out, *more))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "", "stdout belongs to results"
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def divided(
    vllm_python: Path, exported: Path, environment: dict[str, str], evaluated: Path
) -> dict[str, Any]:
    """What an engine of two processes answers. Their threads are bound by nobody: vLLM would ask for a NUMA node each."""
    unbound = {**environment, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return asked(vllm_python, unbound, exported, evaluated.parent / "divided.json")


@pytest.fixture(scope="session")
def base_url(
    vllm_python: Path, exported: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`vllm serve`, which knows the model by its directory and by a name."""
    port = _free_port()
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


def _free_port() -> int:
    """Below 32768, from where on Linux gives ports to connections: the server takes its own seconds later."""
    for port in range(15000 + os.getpid() % 4000, 32768):
        with socket.socket() as here, contextlib.suppress(OSError):
            here.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
