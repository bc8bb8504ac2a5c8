"""What the ranks do where a test looks at how they share a cache. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from jobs import refusal, run_config
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


def repair(
    settings: dict[str, Any], *, identity: dict[str, Any], refused: str | None = None
) -> dict[str, Any]:
    """A repair by all ranks; says which files this one read, what the report names, and what it was refused with.

    Args:
        refused: name of a file that the system does not hand out.
    """
    from asft_nemo.errors import CacheError
    from asft_nemo.nemo.cache_job import repair_together, start_ranks
    from asft_nemo.reference import cache_repair, cache_shard
    from asft_nemo.reference.cache_store import CacheIdentity

    run = run_config(settings)
    start_ranks(run)
    checked: list[str] = []
    read = cache_repair.read_index

    def noted(path: Path, identity: CacheIdentity) -> Any:
        checked.append(path.name)
        if path.name == refused:
            raise cache_shard.refused(path, OSError(errno.EIO, os.strerror(errno.EIO)))
        return read(path, identity)

    with mock.patch.object(cache_repair, "read_index", noted):
        try:
            report = repair_together(run, CacheIdentity(**identity))
        except CacheError as error:
            return {"checked": checked, "said": str(error)}
    return {
        "checked": checked,
        "damaged": [[shard.path.name, shard.reason] for shard in report.damaged],
        "rewritten": report.manifest_rewritten,
    }
