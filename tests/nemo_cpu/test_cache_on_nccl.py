"""What the cache's ranks ask of torch.distributed that gloo grants and NCCL does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.constants import default_pg_timeout

from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import CacheError
from asft_nemo.nemo.cache import on_first_rank
from asft_nemo.nemo.cache_job import start_ranks

pytestmark = pytest.mark.nemo


def test_what_the_first_rank_says_travels_on_the_groups_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of NCCL refuses tensors of the CPU: "No backend type associated with device type cpu"."""
    asked: dict[str, Any] = {}

    def broadcast(objects: list[Any], **named: Any) -> None:
        asked.update(named)

    def full() -> None:
        raise CacheError("the disk is full")

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(CacheError, match="the disk is full"):
        on_first_rank(full)
    assert asked == {"src": 0}


def test_ranks_wait_longer_for_each_other_than_nccl_would(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def init(name: str, **named: Any) -> None:
        raise Asked(named["timeout"])

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(Asked) as asked:
        start_ranks(RunConfig())
    assert asked.value.args[0] == default_pg_timeout
    assert default_pg_timeout.total_seconds() >= 1800
