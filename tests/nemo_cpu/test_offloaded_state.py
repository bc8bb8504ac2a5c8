"""A resume with `optim.cpu_offload`: what NeMo does on a GPU and a CPU rank cannot show, for there the host is the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from asft_nemo.nemo import compat

pytestmark = pytest.mark.nemo

OTHER = torch.device("meta")  # stands for the GPU


class OnOther(compat.AnchoredStrategy):
    """The strategy as far as NeMo's loading of an optimizer asks it."""

    root_device = OTHER  # type: ignore[assignment]
    optimizers: ClassVar[list[Any]] = []  # type: ignore[assignment, misc]
    save_ckpt_format, _fsdp = "torch_dist", None

    def should_restore_optimizer_states(self, selective_restore: bool = False) -> bool:
        return True


def moments() -> dict[str, Any]:
    return {"exp_avg": torch.zeros(3), "step": torch.zeros(())}


def loaded(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo's own loading, up to what the optimizer makes of it."""
    part: Any = object.__new__(compat.DistributedOptimizer)
    part.optimizer, part.is_stub_optimizer = optimizer, False
    given: list[Any] = []
    strategy: Any = object.__new__(OnOther)
    strategy.optimizers = [
        SimpleNamespace(mcore_optimizer=part, state=optimizer.state, load_state_dict=given.append)
    ]
    monkeypatch.setattr("megatron.core.parallel_state.get_data_parallel_group", lambda: None)
    monkeypatch.setattr("torch.distributed.device_mesh.DeviceMesh.from_group", lambda *_: None)
    strategy.load_optimizer_state_dict({"optimizer": ["state"]})
    assert given == ["state"]


def test_nemo_moves_a_loaded_state_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    held = moments()
    loaded(SimpleNamespace(state={"weight": held}), monkeypatch)
    assert (held["exp_avg"].device, held["step"].device.type) == (OTHER, "cpu")


def test_moments_are_where_their_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an optimizer that keeps a share of them in host memory on purpose: its dicts are those of its parts."""
    there, here = torch.empty(3, device=OTHER), torch.empty(3)
    of_device, of_host = moments(), moments()
    hybrid: Any = object.__new__(compat.HybridDeviceOptimizer)
    hybrid.__dict__ |= {
        "state": {"a": of_device, "b": of_host},
        "gpu_optimizer": SimpleNamespace(state={there: of_device}),
        "cpu_optimizers": [SimpleNamespace(state={here: of_host})],
    }
    loaded(hybrid, monkeypatch)
    assert (of_device["exp_avg"].device, of_host["exp_avg"].device.type) == (OTHER, "cpu")
    assert {of_device["step"].device.type, of_host["step"].device.type} == {"cpu"}
