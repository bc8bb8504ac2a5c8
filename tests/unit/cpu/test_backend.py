"""The table of patches: guarded, used only where no GPU is, and doing what each row says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from asft_nemo.config.paths import project_dir
from asft_nemo.cpu import backend
from asft_nemo.cpu.backend import PATCHES, Patch, UpstreamMovedError

PAGE = project_dir() / "docs" / "cpu_backend.md"


def test_every_row_says_why_and_for_which_version() -> None:
    assert len({patch.symbol for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert patch.reason
        assert patch.upstream.split()[-1][0].isdigit()
        assert patch.stage in ("before_megatron", "after_megatron", "after_nemo")


def test_a_symbol_that_is_gone_raises() -> None:
    with pytest.raises(UpstreamMovedError, match=r"torch.cuda:no_such_thing .*is not there any more"):
        Patch("torch.cuda:no_such_thing", lambda: None, "a test", "torch 2.13.0").apply()
    with pytest.raises(UpstreamMovedError):
        Patch("torch.cuda:nothing.at.all", lambda: None, "a test", "torch 2.13.0").apply()


@pytest.mark.parametrize(
    ("gpu", "variable", "expected"),
    [(True, "", False), (True, "cpu", True), (False, "", True), (False, "cpu", True)],
)
def test_never_wanted_on_a_gpu_machine_unasked(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, variable: str, expected: bool
) -> None:
    monkeypatch.setattr(backend, "_active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("ASFT_DEVICE", variable)
    assert backend.wanted() is expected


def test_install_touches_nothing_on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ASFT_DEVICE", raising=False)
    before = torch.cuda.current_device, torch.cuda.Stream, torch.nn.Module.cuda
    assert backend.install() is False
    assert (torch.cuda.current_device, torch.cuda.Stream, torch.nn.Module.cuda) == before


def test_cuda_means_cpu() -> None:
    """In a process of its own: a test before this one may have installed the mode already."""
    code = """
import torch
from asft_nemo.cpu.backend import CudaMeansCpu
with CudaMeansCpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(2).to("cuda:0").device.type == "cpu"
    assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
    assert torch.ones(2).cuda().device.type == "cpu"
    assert not torch.tensor(1.0, pin_memory=True).is_pinned()
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_installed_in_a_process_of_its_own() -> None:
    """In a fresh process: said aloud once, idempotent, and refused after megatron was imported."""
    code = """
import logging; logging.basicConfig(level=logging.WARNING, format="%(message)s")
from asft_nemo.cpu import backend
assert backend.install() and backend.install() and backend.active()
import torch
assert torch.cuda.current_device() == torch.device("cpu")
assert isinstance(torch.ones(1), torch.cuda.FloatTensor) and not isinstance(torch.ones(1), torch.cuda.HalfTensor)
assert torch.cuda.BFloat16Tensor([1.0]).dtype == torch.bfloat16
state = torch.cuda.get_rng_state(); a = torch.rand(3); torch.cuda.set_rng_state(state); assert torch.equal(a, torch.rand(3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CPU backend active") == 1
    late = "import megatron.core.tensor_parallel\nfrom asft_nemo.cpu import backend\nbackend.install()"
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=240)
    assert "megatron was imported before the CPU backend" in done.stderr


@pytest.mark.skipif(not PAGE.is_file(), reason="no docs here: not a clone")
def test_the_page_quotes_the_line_of_a_run() -> None:
    # what is no symbol, `CudaMeansCpu`, counts too
    assert f"CPU backend active: {len(PATCHES) + 1} patches let NeMo and Megatron run" in PAGE.read_text()
