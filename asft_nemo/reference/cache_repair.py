"""Checking every byte of a cache, and setting aside what is damaged so that only that is computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asft_nemo.errors import CacheError
from asft_nemo.reference.cache_manifest import (
    MANIFEST_NAME,
    CacheIdentity,
    DamagedManifest,
    check_identity,
    disk_errors,
    sync_directory,
    write_manifest,
)
from asft_nemo.reference.cache_shard import (
    HEADER_BYTES,
    DamagedShard,
    ForeignShard,
    ShardIndex,
    read_index,
    refused,
    row_checksums,
    row_seeds,
    shard_paths,
)
from asft_nemo.reference.cache_writer import remove_partial_shards

logger = logging.getLogger(__name__)

DAMAGED_SUFFIX = ".damaged"
_BLOCK_BYTES = 8 << 20

Progress = Callable[[int, int, str], None]  # bytes checked, bytes in all, file


@dataclass(frozen=True)
class RepairReport:
    """What a repair found and did.

    Attributes:
        damaged: the shards set aside, under their name with `.damaged` behind it; they may be deleted.
        manifest_rewritten: whether the manifest was damaged or missing.
        partial_shards_removed: files of writers that were killed.
    """

    damaged: tuple[DamagedShard, ...]
    manifest_rewritten: bool
    partial_shards_removed: int


def verify_cache(
    directory: str | Path, identity: CacheIdentity, *, progress: Progress | None = None
) -> list[DamagedShard]:
    """Reads every byte of every shard and changes nothing.

    Returns:
        The damaged shards, each with what is wrong first; empty where all is well.

    Raises:
        CacheError: no cache, a damaged manifest, another identity, or a shard that cannot be read.
    """
    check_identity(directory, identity)
    return _damaged_shards(Path(directory), identity, progress)


def repair_cache(
    directory: str | Path,
    identity: CacheIdentity,
    *,
    written_by: Mapping[str, Any],
    progress: Progress | None = None,
) -> RepairReport:
    """Sets damaged shards aside, rewrites a damaged or missing manifest, and removes partial shards.

    What was lost is then `missing` for a reader. No process may be writing into the cache from another machine.

    Args:
        directory: `reference.cache_dir`.
        identity: of this run; an intact cache of another identity is left alone.
        written_by: for a manifest that has to be written again, as for `open_or_create`.
        progress: called as the bytes are checked.

    Raises:
        CacheError: no cache, or rows of another identity, or the folder cannot be written.
    """
    directory = Path(directory)
    rewrite = False
    try:
        check_identity(directory, identity)
    except DamagedManifest:
        rewrite = True
    except CacheError:
        if (directory / MANIFEST_NAME).exists() or not directory.is_dir() or not shard_paths(directory):
            raise
        rewrite = True
    damaged = _damaged_shards(directory, identity, progress)
    foreign = [shard for shard in damaged if isinstance(shard, ForeignShard)]
    if rewrite and foreign:
        # Without a manifest nothing says whether these rows or this run's settings are the wrong ones.
        raise CacheError(
            f"{foreign[0].path}: {foreign[0].reason}: set another reference.cache_dir, or remove this one"
        )
    with disk_errors(directory):
        for shard in damaged:
            shard.path.rename(shard.path.with_name(shard.path.name + DAMAGED_SUFFIX))
            logger.warning("%s: %s; set aside", shard.path, shard.reason)
        if rewrite:
            write_manifest(directory, identity, written_by=written_by)
        removed = remove_partial_shards(directory)
        sync_directory(directory)
    return RepairReport(tuple(damaged), rewrite, removed)


def _damaged_shards(
    directory: Path, identity: CacheIdentity, progress: Progress | None
) -> list[DamagedShard]:
    paths = shard_paths(directory)
    sizes = [path.stat().st_size for path in paths]
    damaged: list[DamagedShard] = []
    for number, path in enumerate(paths):
        try:
            _check_rows(read_index(path, identity))
        except DamagedShard as error:
            damaged.append(error)
        if progress is not None:
            progress(sum(sizes[: number + 1]), sum(sizes), path.name)
    return damaged


def _check_rows(index: ShardIndex) -> None:
    """Compares every row with its checksum.

    Raises:
        DamagedShard: one differs, or the file is gone or cut.
        UnreadableShard: the system refuses to hand it out.
    """
    file = index.file
    ids, offsets = index.row_keys()
    try:
        with file.path.open("rb") as stream:
            stream.seek(file.bytes - 4 * file.num_rows)
            expected = np.frombuffer(stream.read(4 * file.num_rows), "<u4")
            stream.seek(HEADER_BYTES)
            step = max(1, _BLOCK_BYTES // file.row_bytes)
            for start in range(0, file.num_rows, step):
                stop = min(start + step, file.num_rows)
                rows = np.frombuffer(stream.read((stop - start) * file.row_bytes), np.uint8)
                found = row_checksums(
                    rows.reshape(stop - start, file.row_bytes),
                    row_seeds(ids[start:stop], offsets[start:stop]),
                )
                wrong = np.flatnonzero(found != expected[start:stop])
                if wrong.size:
                    at = start + int(wrong[0])
                    raise DamagedShard(
                        file.path,
                        f"the checksum of sample {ids[at]}, token offset {offsets[at]} does not match",
                    )
    except OSError as error:
        raise refused(file.path, error) from error
    except ValueError as error:  # a file that is cut meanwhile gives too few bytes for its rows
        raise DamagedShard(file.path, f"it is shorter than it was: {error}") from error
