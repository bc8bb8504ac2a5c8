"""What the ranks do where a test looks at how they share a cache. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from jobs import refusal
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


def refusal_on_a_small_disk(settings: dict[str, Any], *, free: int) -> str:
    """The sentence a run is refused with where the disk of its cache has so many bytes left."""
    from asft_nemo.reference import cache_manifest

    small = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free))
    with mock.patch.object(cache_manifest, "shutil", small):
        return refusal(settings)
