"""What this project chooses where a part is there, and where it is not; fakes stand for the parts, and nothing computes with them.

As a program (with fakes of apex's modules on the path): prints the choices as one JSON object.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import torch


def choices(
    model: str, folder: str, *, transformer_engine: bool, layers: str = "auto", precision: str = "bf16"
) -> dict[str, Any]:
    """What a process of a GPU machine would choose; only the look at the device is left out.

    Args:
        model: Hugging Face directory.
        folder: where a run would write.
        transformer_engine: a module of that name can be imported.
        layers: `kernels.layers`.
        precision: of the run.
    """
    from jobs import run_config

    import asft_nemo.nemo  # noqa: F401  (installs the CPU backend before megatron is imported)
    from asft_nemo.cpu import backend
    from asft_nemo.errors import ConfigError
    from asft_nemo.nemo import layer_spec, switches

    given = {"model.path": model, "run.dir": folder, "objective.name": "sft", "precision": precision}
    run, asked = (
        run_config({**given, **more}) for more in ({}, {"kernels.gradient_accumulation_fusion": True})
    )
    fakes = {name: fake(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    with ExitStack() as undo:
        undo.callback(layer_spec.choose_layers, "auto", "bf16")
        undo.enter_context(mock.patch.object(backend, "active", return_value=False))
        if transformer_engine:
            undo.enter_context(mock.patch.dict(sys.modules, fakes))
            undo.enter_context(mock.patch.object(layer_spec, "version_of", return_value="2.8.0"))
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high")  # TF32, as NVIDIA's images have it
        layer_spec.choose_layers(layers, precision)
        kernels = switches.layer_kernels(run)
        refused = ""
        try:
            switches.fused_gradients(asked)
        except ConfigError as error:
            refused = str(error)
        return {
            "line": layer_spec.kernels_line(),
            "matmul": torch.get_float32_matmul_precision(),
            "rope": kernels["apply_rope_fusion"],
            "softmax": kernels["masked_softmax_fusion"],
            "fused_gradients": switches.fused_gradients(run),
            "refused": refused,
        }


def fake(name: str) -> ModuleType:
    """An empty package that importlib finds."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    if "." not in name:
        module.pytorch = None  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    print(json.dumps(choices(sys.argv[1], sys.argv[2], transformer_engine=False)))
