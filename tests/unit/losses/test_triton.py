"""The Triton kernels in Triton's interpreter on the CPU, and when they are used at all."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_cases

from asft_nemo.errors import ConfigError
from asft_nemo.losses.triton import dispatch, use_triton

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -r requirements/dev.txt"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{case: None, or the traceback of what went wrong}, all from one process."""
    out = tmp_path_factory.mktemp("triton") / "outcomes.json"
    environment = os.environ | {
        "ASFT_TRITON": "interpret",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(out.parent / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(Path(triton_cases.__file__)), str(out)],
        env=environment,
        timeout=560,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", list(triton_cases.CASES))
def test_in_the_interpreter(outcomes, case):
    assert outcomes[case] is None, outcomes[case]


def test_a_cpu_uses_pytorch(monkeypatch):
    for value in (None, "0", "1"):
        monkeypatch.delenv("ASFT_TRITON", raising=False)
        if value is not None:
            monkeypatch.setenv("ASFT_TRITON", value)
        assert not use_triton(torch.zeros(2, 3))


def test_wrong_settings_say_the_cure(monkeypatch):
    monkeypatch.setenv("ASFT_TRITON", "yes")
    with pytest.raises(ConfigError, match="ASFT_TRITON='yes' means nothing: unset it"):
        use_triton(torch.zeros(2, 3))
    monkeypatch.setenv("ASFT_TRITON", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs TRITON_INTERPRET=1 before Python starts"):
        use_triton(torch.zeros(2, 3))


def cuda_logits(dtype=torch.float32, elements=6):
    """What the decision looks at, of a tensor that this machine may be unable to hold."""
    return SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda", 0), numel=lambda: elements)


def test_on_cuda_it_is_tried_once_and_off_where_it_fails(monkeypatch, caplog):
    monkeypatch.delenv("ASFT_TRITON", raising=False)
    dispatch._works_on.cache_clear()
    tries = []

    def broken(device):
        tries.append(device)
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr("asft_nemo.losses.triton.launch.try_out", broken)
    with caplog.at_level(logging.INFO):
        assert [use_triton(cuda_logits()) for _ in range(3)] == [False] * 3
    assert tries == [torch.device("cuda", 0)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "PyTorch instead of Triton on cuda:0 (RuntimeError: Failed to find C compiler.)" in caplog.text

    dispatch._works_on.cache_clear()
    caplog.clear()
    monkeypatch.setattr("asft_nemo.losses.triton.launch.try_out", lambda device: None)
    with caplog.at_level(logging.INFO):
        assert [use_triton(cuda_logits()) for _ in range(3)] == [True] * 3
    assert [record.message for record in caplog.records] == ["the loss uses Triton kernels on cuda:0"]
    assert not use_triton(cuda_logits(torch.float64)), "fp64 is PyTorch's"
    assert not use_triton(cuda_logits(elements=0)), "a rank without vocabulary rows is PyTorch's"
    monkeypatch.setenv("ASFT_TRITON", "0")
    assert not use_triton(cuda_logits())
    dispatch._works_on.cache_clear()


def test_the_losses_do_not_import_triton():
    program = "import sys, asft_nemo.losses; sys.exit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
