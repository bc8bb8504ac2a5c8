"""Checking every byte of a cache, and setting aside what is damaged so that only that is computed again."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
class RepairPlan:
    """What a repair has to do.

    Attributes:
        rewrite_manifest: it is damaged or missing.
        shards: names of the files to check.
    """

    rewrite_manifest: bool
    shards: tuple[str, ...]


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
    return list(_damaged_among(shard_paths(Path(directory)), identity, progress))


def begin_repair(directory: str | Path, identity: CacheIdentity) -> RepairPlan:
    """A repair's beginning, on one process: looks what there is to check, and changes nothing.

    `set_damaged_aside` follows, on as many processes as there are, each with a part of the shards; then `end_repair`, on one. What
    was lost is `missing` for a reader afterwards.

    Args:
        directory: `reference.cache_dir`.
        identity: of this run; an intact cache of another identity is left alone.

    Raises:
        CacheError: no cache, or rows of another identity.
    """
    directory = Path(directory)
    try:
        check_identity(directory, identity)
    except DamagedManifest:
        rewrite = True
    except CacheError:
        if (directory / MANIFEST_NAME).exists() or not directory.is_dir() or not shard_paths(directory):
            raise
        rewrite = True
    else:
        rewrite = False
    paths = shard_paths(directory)
    for path in paths if rewrite else ():
        try:
            read_index(path, identity)
        except ForeignShard as shard:
            # Without a manifest nothing says whether these rows or this run's settings are the wrong ones.
            raise CacheError(
                f"{path}: {shard.reason}: set another reference.cache_dir, or remove this one"
            ) from shard
        except DamagedShard:
            continue
    return RepairPlan(rewrite, tuple(path.name for path in paths))


def set_damaged_aside(
    directory: str | Path, identity: CacheIdentity, names: Sequence[str], *, progress: Progress | None = None
) -> list[DamagedShard]:
    """Checks these shards, and sets each damaged one aside at once: a repair that is interrupted need not find it again.

    Returns:
        What was set aside.

    Raises:
        CacheError: a shard cannot be read, or the folder cannot be written.
    """
    directory = Path(directory)
    damaged: list[DamagedShard] = []
    for shard in _damaged_among([directory / name for name in names], identity, progress):
        with disk_errors(directory):
            try:
                shard.path.rename(shard.path.with_name(shard.path.name + DAMAGED_SUFFIX))
            except FileNotFoundError:
                logger.warning("%s has gone meanwhile", shard.path)
                continue
        logger.warning("%s: %s; set aside", shard.path, shard.reason)
        damaged.append(shard)
    return damaged


def end_repair(
    directory: str | Path,
    identity: CacheIdentity,
    plan: RepairPlan,
    damaged: Sequence[DamagedShard],
    *,
    written_by: Mapping[str, Any],
) -> RepairReport:
    """Rewrites the manifest where the plan says so, removes partial shards, and makes durable what was done.

    Raises:
        CacheError: the folder cannot be written.
    """
    directory = Path(directory)
    with disk_errors(directory):
        if plan.rewrite_manifest:
            write_manifest(directory, identity, written_by=written_by)
        removed = remove_partial_shards(directory)
        sync_directory(directory)
    return RepairReport(tuple(damaged), plan.rewrite_manifest, removed)


def _damaged_among(
    paths: Sequence[Path], identity: CacheIdentity, progress: Progress | None
) -> Iterator[DamagedShard]:
    """The damaged ones, each as soon as it is found."""
    sizes = [_size(path) for path in paths]
    for path, done in zip(paths, itertools.accumulate(sizes), strict=True):
        try:
            _check_rows(read_index(path, identity))
        except DamagedShard as error:
            yield error
        if progress is not None:
            progress(done, sum(sizes), path.name)


def _size(path: Path) -> int:
    """Bytes, for the progress that is shown; of a file that is not there, none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


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
