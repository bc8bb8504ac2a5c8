"""How long the ranks of a run wait for each other before torch ends them: longer than for one that hangs, which is to be named first."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from asft_nemo.config.schema import AlarmsConfig
from asft_nemo.nemo import compat

pytestmark = pytest.mark.nemo

NEMO = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"


@pytest.mark.parametrize(
    ("backend", "environment", "minutes"),
    [("nccl", {}, [30]), ("nccl", {NEMO: "7200"}, []), ("gloo", {}, [])],
)
def test_nccl_waits_longer_than_the_hang_watch(
    backend: str, environment: dict[str, str], minutes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo's is 30 minutes already, and who told NeMo another one has it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told: list[timedelta] = []
    monkeypatch.setattr(compat.MegatronStrategy, "setup_distributed", lambda self: None)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(distributed_c10d, "_set_pg_timeout", told.append)
    compat.AnchoredStrategy.setup_distributed(object.__new__(compat.AnchoredStrategy))
    assert told == [timedelta(minutes=number) for number in minutes]
    hangs = AlarmsConfig().hang_seconds
    assert hangs is not None
    assert all(one.total_seconds() > 2 * hangs for one in told)
