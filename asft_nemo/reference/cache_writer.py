"""Writing the reference's hidden states: shards of one process's own, each complete or not there."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from asft_nemo.errors import CacheError
from asft_nemo.reference.cache_manifest import CacheIdentity, check_identity, disk_errors, sync_directory
from asft_nemo.reference.cache_shard import (
    HEADER_BYTES,
    Int64s,
    Integers,
    UInt32s,
    as_int64,
    encode_index,
    machine_of,
    next_sequence,
    partial_path,
    partial_paths,
    row_checksums,
    row_seeds,
    runs_of,
    shard_name,
)

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20  # a writer killed loses at most this much
SHARD_SECONDS = 60.0  # or what it computed in this time
# Longer than a living writer leaves a shard alone: ranks wait for each other up to their group's time-out, 30 minutes, and as long again is
# left for a validation and a checkpoint between two steps of a first epoch, and for clocks that differ.
ABANDONED_SECONDS = 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CacheWriter:
    """Appends examples to shards of its own. Not thread safe.

    Args:
        directory: a cache made by `open_or_create`.
        writer_id: unique among the processes that write at the same time, for example the data-parallel rank.
        identity: of the cache.
        shard_bytes: a shard is finished before it would grow beyond this; an example is never split.
        shard_seconds: a shard older than this is finished when the next example comes.

    Attributes:
        num_samples, num_rows, bytes: added so far; bytes of rows.

    Raises:
        CacheError: the folder is not the cache of this identity, or cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        writer_id: int,
        identity: CacheIdentity,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ):
        self.directory, self.writer_id, self.identity = Path(directory), writer_id, identity
        self.num_samples = self.num_rows = self.bytes = 0
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._shard: _OpenShard | None = None
        self._closed = False
        check_identity(directory, identity)
        # So that no two processes can ever write one file, whatever their ids.
        self._token = secrets.token_hex(4)
        with disk_errors(self.directory):
            remove_partial_shards(self.directory, writer_id)
            self._sequence = next_sequence(self.directory, writer_id)

    def add(self, sample_id: int, offsets: Integers, rows: Tensor) -> None:
        """Stores one example; all its rows at once. An example without valid tokens is stored too, so that it is not missing.

        Args:
            sample_id: 0 or more.
            offsets: positions in the unpacked example, strictly increasing, below the sequence length; [n].
            rows: their hidden states, [n, h] of the cache's dtype, on any device.

        Raises:
            CacheError: the disk is full or refuses; the partial shard is removed, finished ones stay.
            ValueError: arguments that do not fit the identity.
        """
        offsets_N = as_int64(offsets)
        self._check(sample_id, offsets_N, rows)
        size = offsets_N.size * self.identity.row_bytes
        with disk_errors(self.directory):
            if self._shard is not None and self._shard.is_due(size, self._shard_bytes, self._shard_seconds):
                self._finish()
            if self._shard is None:
                name = shard_name(self.writer_id, self._sequence, self._token)
                self._shard = _OpenShard(self.directory / name, self.identity)
                self._sequence += 1
            try:
                self._shard.append(sample_id, offsets_N, rows)
            except BaseException:
                self._discard()
                raise
        self.num_samples += 1
        self.num_rows += offsets_N.size
        self.bytes += size

    def _check(self, sample_id: int, offsets_N: Int64s, rows: Tensor) -> None:
        identity = self.identity
        if self._closed:
            raise ValueError("the writer is closed")
        if sample_id < 0:
            raise ValueError(f"sample id {sample_id} is negative: filler items are not stored")
        expected = (offsets_N.size, identity.hidden_size)
        if tuple(rows.shape) != expected or rows.dtype != identity.torch_dtype:
            raise ValueError(
                f"rows of sample {sample_id} are {rows.dtype} {list(rows.shape)}, expected"
                f" {identity.torch_dtype} {list(expected)}"
            )
        inside = offsets_N.size == 0 or (offsets_N[0] >= 0 and offsets_N[-1] < identity.sequence_length)
        if not inside or np.any(np.diff(offsets_N) < 1):
            raise ValueError(
                f"offsets of sample {sample_id} must increase strictly from 0 or more to less than"
                f" {identity.sequence_length}"
            )

    def flush(self) -> None:
        """Finishes the open shard: what was added so far survives a kill and is seen by readers opened later.

        Raises:
            CacheError: the disk is full or refuses; the partial shard is removed.
        """
        with disk_errors(self.directory):
            self._finish()

    def close(self) -> None:
        """Finishes the open shard; nothing can be added afterwards.

        Raises:
            CacheError: as `flush`.
        """
        self._closed = True
        self.flush()

    def _finish(self) -> None:
        if self._shard is not None:
            try:
                self._shard.finish()
            except BaseException:
                self._discard()
                raise
            self._shard = None

    def _discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()
            self._shard = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CacheError:
            if error is None:
                raise
            logger.exception("the last shard is lost")  # the first error says more and goes on


class _OpenShard:
    """The shard that a writer appends to, under its temporary name."""

    def __init__(self, path: Path, identity: CacheIdentity):
        self._path, self._identity = path, identity
        self._partial = partial_path(path, this_machine())
        self._bytes = 0
        self._started = time.monotonic()
        self._sample_ids: list[int] = []
        self._offsets: list[Int64s] = []
        self._row_crc32: list[UInt32s] = []
        self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        # Says that the writer lives; it ends with the process. Not every file system can.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.lseek(self._descriptor, HEADER_BYTES, os.SEEK_SET)

    def is_due(self, more: int, shard_bytes: int, shard_seconds: float) -> bool:
        """Whether it should be finished before `more` bytes are added."""
        full = self._bytes > 0 and self._bytes + more > shard_bytes
        return full or time.monotonic() - self._started > shard_seconds

    def append(self, sample_id: int, offsets_N: Int64s, rows: Tensor) -> None:
        """Writes one example's rows."""
        count = offsets_N.size
        if count:
            raw = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
            ids = np.full(count, sample_id, dtype=np.int64)
            self._row_crc32.append(row_checksums(raw, row_seeds(ids, offsets_N)))
            self._write(raw.reshape(-1).data)
        self._bytes += count * self._identity.row_bytes
        self._sample_ids.append(sample_id)
        self._offsets.append(offsets_N)

    def finish(self) -> None:
        """Writes index, checksums and header, syncs, and gives the file its final name."""
        runs = [runs_of(offsets) for offsets in self._offsets]
        none = np.zeros(0, dtype=np.int64)
        columns = {
            "sample_ids": np.asarray(self._sample_ids, dtype=np.int64),
            "row_counts": np.asarray([offsets.size for offsets in self._offsets], dtype=np.int64),
            "run_counts": np.asarray([starts.size for starts, _ in runs], dtype=np.int64),
            "run_starts": np.concatenate([none, *(starts for starts, _ in runs)]),
            "run_lengths": np.concatenate([none, *(lengths for _, lengths in runs)]),
        }
        row_crc32 = np.concatenate([np.zeros(0, dtype=np.uint32), *self._row_crc32])
        header, index = encode_index(self._identity, columns, num_rows=row_crc32.size)
        self._write(memoryview(index + row_crc32.astype("<u4").tobytes()))
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._write(memoryview(header))
        os.fsync(self._descriptor)
        os.rename(self._partial, self._path)
        self._close()
        sync_directory(self._path.parent)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _close(self) -> None:
        """Once: its number may be another file's afterwards, also where the call fails."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def discard(self) -> None:
        """Removes the temporary file."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self._partial.unlink()


def remove_partial_shards(directory: Path, writer_id: int | None = None) -> int:
    """Removes partial shards of killed writers; those of living ones are locked and stay.

    A lock may not be seen from another machine (Lustre's `localflock`, some FUSE file systems), so what another machine left, or
    this one before it was started anew, goes only once nothing has been written into it for `ABANDONED_SECONDS`.

    Args:
        directory: the cache.
        writer_id: whose; None for all.

    Returns:
        How many were removed.
    """
    removed = 0
    for path in partial_paths(directory, writer_id):
        try:
            # NFS grants a lock that keeps others away only on a file that is open for writing.
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # finished or removed since it was listed
        except OSError as error:
            logger.info("%s stays: it cannot be opened (%s)", path, error)
            continue
        try:
            if _is_abandoned(path, descriptor):
                path.unlink(missing_ok=True)
                removed += 1
        finally:
            os.close(descriptor)
    return removed


def _is_abandoned(path: Path, descriptor: int) -> bool:
    """Whether no writer has this partial shard any more; locks it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s is being written by another process", path)
        return False
    except OSError as error:
        logger.info("%s stays: this file system cannot tell whether its writer lives (%s)", path, error)
        return False
    here, age = this_machine(), time.time() - os.fstat(descriptor).st_mtime
    if age >= ABANDONED_SECONDS or (here and here == machine_of(path)):
        return True
    logger.info("%s stays: another machine wrote into it %.0f s ago and may go on", path, age)
    return False


def this_machine() -> str:
    """What all processes under this kernel agree on, 8 hexadecimal digits; empty where it says nothing."""
    try:
        return _BOOT_ID.read_text()[:8]
    except OSError:
        return ""
