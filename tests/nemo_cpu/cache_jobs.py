"""What the ranks do where a test looks at how they share a cache. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from reference_jobs import cache_itself


def cache_amid_another_job(settings: dict[str, Any]) -> None:
    """The job where another one finishes a shard while the ranks begin: for all but rank 0, half of the examples are there already."""
    from asft_nemo.reference.cache_store import CacheReader

    look = CacheReader.missing

    def later(self: CacheReader, ids: Any) -> list[int]:
        found = look(self, ids)
        return found if torch.distributed.get_rank() == 0 else found[len(found) // 2 :]

    with mock.patch.object(CacheReader, "missing", later):
        cache_itself(settings, repair=False)
