"""Layers, fused gradients, fused softmax and Adam: what is chosen where Transformer Engine or apex is, and where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import RankGroup

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

TORCH = "Adam: torch's AdamW"


@pytest.mark.parametrize(
    ("transformer_engine", "layers", "precision", "said"),
    [
        (False, "auto", "bf16", "layers: Megatron's local ones (no Transformer Engine)"),
        (True, "auto", "bf16", "layers: Transformer Engine 2.8.0"),
        (True, "local", "bf16", "layers: Megatron's local ones (kernels.layers=local)"),
        (True, "auto", "fp32", "layers: Megatron's local ones (precision=fp32)"),
    ],
)
def test_layers(
    ranks2: RankGroup,
    model: Path,
    tmp_path: Path,
    transformer_engine: bool,
    layers: str,
    precision: str,
    said: str,
) -> None:
    """The rotary embedding's kernel is Transformer Engine's, which multiplies fp32 as TF32; without apex there is neither fused softmax nor fused gradient."""
    for found in ranks2.run(
        "fallback_jobs:choices",
        model=str(model),
        folder=str(tmp_path),
        transformer_engine=transformer_engine,
        layers=layers,
        precision=precision,
    ):
        assert found["line"] == f"{said}; {TORCH}"
        assert found["matmul"] == ("highest" if precision == "fp32" else "high")
        assert found["rope"] is said.startswith("layers: Transformer Engine")
        assert (found["softmax"], found["fused_gradients"]) == (False, False)
        assert "fused_weight_gradient_mlp_cuda of apex cannot be imported" in found["refused"]


def test_apex(model: Path, tmp_path: Path) -> None:
    """With apex's modules on the path: its Adam, its softmax for Megatron's own layers, and fused gradients unasked."""
    optimizers = "from torch.optim import AdamW\nclass FusedAdam(AdamW): pass\nclass FusedSGD: pass\nclass FusedLAMB: pass\n"
    files = {
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": optimizers,
        **{
            f"{name}.py": ""
            for name in (
                "fused_weight_gradient_mlp_cuda",
                "scaled_masked_softmax_cuda",
                "scaled_upper_triang_masked_softmax_cuda",
            )
        },
    }
    for name, text in files.items():
        (tmp_path / "fakes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fakes" / name).write_text(text)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", here / "fallback_jobs.py", model, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "ASFT_DEVICE": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "fakes", here, here.parent, here.parents[1]))),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "line": "layers: Megatron's local ones (no Transformer Engine); Adam: apex's FusedAdam",
        "matmul": "high",
        "rope": False,
        "softmax": True,
        "fused_gradients": True,
        "refused": "",
    }
