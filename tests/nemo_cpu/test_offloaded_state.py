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


@pytest.mark.parametrize(
    ("inner", "device"), [(compat.HybridDeviceOptimizer, "cpu"), (torch.optim.SGD, "meta")]
)
def test_state_in_host_memory_stays_there(inner: type, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo moves the state of every optimizer to the device, also of one that keeps a share in host memory on purpose."""
    moments = {"exp_avg": torch.zeros(3), "step": torch.zeros(())}
    part: Any = object.__new__(compat.DistributedOptimizer)
    part.optimizer = object.__new__(inner)
    part.optimizer.__dict__["state"] = {"weight": moments}
    part.is_stub_optimizer = False
    loaded: list[Any] = []
    strategy: Any = object.__new__(OnOther)
    strategy.optimizers = [
        SimpleNamespace(mcore_optimizer=part, state=part.optimizer.state, load_state_dict=loaded.append)
    ]
    monkeypatch.setattr("megatron.core.parallel_state.get_data_parallel_group", lambda: None)
    monkeypatch.setattr(torch.distributed.DeviceMesh, "from_group", lambda *_: None)
    strategy.load_optimizer_state_dict({"optimizer": ["state"]})
    assert loaded == ["state"]
    assert moments["exp_avg"].device.type == device
