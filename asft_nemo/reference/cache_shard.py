"""One file of cached hidden states: rows, an index that says whose they are, and a checksum of every row.

A shard is a plain safetensors file (https://huggingface.co/docs/safetensors), so other tools can look into it:

| tensor | dtype, shape | holds |
|---|---|---|
| `rows` | the cache's, `[n, h]` | final hidden states, from byte 4096 on |
| `sample_ids` | int64 `[s]` | examples, in the order they were added |
| `row_counts` | int64 `[s]` | rows of each |
| `run_counts` | int64 `[s]` | runs of neighbouring token offsets of each |
| `run_starts`, `run_lengths` | int64 `[r]` | first offset and length of each run |
| `index_crc32` | uint32 `[1]` | CRC-32 of the header and of the five tensors above |
| `row_crc32` | uint32 `[n]` | CRC-32 of each row, begun from a number made of its sample id and token offset |

A row's checksum thus proves its bytes and also whose they are. CRC-32 is computed at 2.2 GB/s on a core of the machine this
was written on, BLAKE2b at 0.5 GB/s; it misses a random change once in 2^32 and never a change within 32 neighbouring bits.
A shard gets its final name once it is complete and synced.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from asft_nemo.errors import CacheError
from asft_nemo.reference.cache_manifest import DTYPES, FORMAT_VERSION, REPAIR, CacheIdentity, differences

HEADER_BYTES = (
    4096  # safetensors allows spaces after the JSON: the header's place is kept free while rows are written
)
PARTIAL_SUFFIX = ".partial"
_NAME = re.compile(r"rows-(\d{5,})-(\d{6,})-[0-9a-f]{8}\.safetensors")
_PARTIAL = re.compile(rf"{_NAME.pattern}(?:\.([0-9a-f]{{8}}))?{re.escape(PARTIAL_SUFFIX)}")
_PER_SAMPLE = ("sample_ids", "row_counts", "run_counts")
_PER_RUN = ("run_starts", "run_lengths")
_INDEX = (*_PER_SAMPLE, *_PER_RUN)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)

Int64s: TypeAlias = npt.NDArray[np.int64]
Integers: TypeAlias = "Sequence[int] | Int64s | Tensor"
UInt32s: TypeAlias = npt.NDArray[np.uint32]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class DamagedShard(CacheError):
    """A shard that is not as it was written.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}): {REPAIR}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[DamagedShard], tuple[Path, str]]:
        """Ranks tell each other what they found."""
        return type(self), (self.path, self.reason)


class ForeignShard(DamagedShard):
    """A shard of another cache: its header is intact and names other fingerprints."""


class UnreadableShard(CacheError):
    """A shard that the system does not hand out now. Whether it is as it was written is not known, so it is not set aside."""


def refused(path: Path, error: OSError) -> CacheError:
    """What a failed call on a shard says: damage where there is no such file, else that it could not be read."""
    words = error.strerror or str(error)
    if error.errno in _NO_FILE:
        what = "is gone" if error.errno == errno.ENOENT else "is no file"
        return DamagedShard(path, f"it {what}: {words}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        cure = "raise the limit of open files (ulimit -n)"
    elif error.errno in (errno.EACCES, errno.EPERM):
        cure = "give read permission"
    else:
        cure = "look after that disk or mount; where the file is lost, remove it, and what it held is computed again"
    return UnreadableShard(f"{path} cannot be read ({words}), which says nothing of its rows: {cure}")


def shard_name(writer_id: int, sequence: int, token: str) -> str:
    """The final name; the token is the writing process's own, so no two processes ever choose the same."""
    return f"rows-{writer_id:05d}-{sequence:06d}-{token}.safetensors"


def partial_path(path: Path, machine: str) -> Path:
    """Where a shard is while it is written; `machine`, 8 hexadecimal digits or nothing, says on which."""
    return path.with_name(f"{path.name}.{machine}{PARTIAL_SUFFIX}" if machine else path.name + PARTIAL_SUFFIX)


def machine_of(partial: Path) -> str:
    """What `partial_path` was told."""
    match = _PARTIAL.fullmatch(partial.name)
    return "" if match is None else match[3] or ""


def shard_paths(directory: Path) -> list[Path]:
    """Complete shards, sorted by name.

    Raises:
        CacheError: the folder cannot be listed.
    """
    try:
        return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    except OSError as error:
        raise CacheError(
            f"{directory} cannot be listed ({error.strerror}): give read permission, or set another"
            " reference.cache_dir"
        ) from error


def partial_paths(directory: Path, writer_id: int | None = None) -> list[Path]:
    """Files of shards that are being written, or that a killed writer left: of one writer, or of all."""
    found = [(path, _PARTIAL.fullmatch(path.name)) for path in directory.iterdir()]
    return sorted(path for path, match in found if match and writer_id in (None, int(match[1])))


def next_sequence(directory: Path, writer_id: int) -> int:
    """One more than the largest sequence number of the writer's shards."""
    matches = [_NAME.fullmatch(path.name) for path in directory.iterdir()]
    return 1 + max((int(match[2]) for match in matches if match and int(match[1]) == writer_id), default=-1)


def as_int64(values: Integers) -> Int64s:
    """Any flat list of whole numbers as an int64 array."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"expected a flat list of whole numbers, got {array.dtype} {list(array.shape)}")
    return array.astype(np.int64, copy=False)


def row_seeds(sample_ids: Int64s, offsets: Int64s) -> UInt32s:
    """What each row's CRC-32 begins from. A row under another key is noticed unless the two keys share a seed (once in 2^32)."""
    mixed = sample_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += offsets.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def row_checksums(rows: Bytes, seeds: UInt32s) -> UInt32s:
    """CRC-32 of each row [n, row bytes] begun from its seed."""
    view, size = rows.reshape(-1).data, rows.shape[1]
    crc = zlib.crc32
    return np.fromiter(
        (crc(view[row * size : (row + 1) * size], seed) for row, seed in enumerate(seeds.tolist())),
        dtype=np.uint32,
        count=len(rows),
    )


def runs_of(offsets: Int64s) -> tuple[Int64s, Int64s]:
    """First offset and length of each run of neighbours in strictly increasing offsets."""
    breaks = np.flatnonzero(np.diff(offsets) != 1) + 1
    bounds = np.concatenate([[0], breaks, [len(offsets)]]) if len(offsets) else np.zeros(1, dtype=np.int64)
    return offsets[bounds[:-1]], np.diff(bounds)


def ranges(starts: Int64s, lengths: Int64s) -> Int64s:
    """The numbers of all runs one after the other: [3, 9], [2, 1] -> 3, 4, 9."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


@dataclass(frozen=True)
class ShardFile:
    """A complete shard: where it lies, its size, its number of rows of `row_bytes` each."""

    path: Path
    bytes: int
    num_rows: int
    row_bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """What a shard says of itself; the arrays are those of the module's table."""

    file: ShardFile
    sample_ids: Int64s
    row_counts: Int64s
    run_counts: Int64s
    run_starts: Int64s
    run_lengths: Int64s

    def row_keys(self) -> tuple[Int64s, Int64s]:
        """Sample id and token offset of every row, in the order of the file."""
        return np.repeat(self.sample_ids, self.row_counts), ranges(self.run_starts, self.run_lengths)


def encode_index(
    identity: CacheIdentity, columns: dict[str, Int64s], *, num_rows: int
) -> tuple[bytes, bytes]:
    """Returns the header (`HEADER_BYTES`) and what stands between the rows and their checksums.

    Args:
        identity: of the cache.
        columns: the int64 arrays of the index by name.
        num_rows: rows of all examples.

    Raises:
        ValueError: the identity's text is too long for the header.
    """
    header = _header(
        identity.json(), identity, len(columns["sample_ids"]), len(columns["run_starts"]), num_rows
    )
    index = b"".join(columns[name].astype("<i8").tobytes() for name in _INDEX)
    return header, index + struct.pack("<I", zlib.crc32(index, zlib.crc32(header)))


def _header(identity_json: str, identity: CacheIdentity, samples: int, runs: int, rows: int) -> bytes:
    """The header of a shard with so many examples, runs and rows: the same counts give the same bytes."""
    table: list[tuple[str, str, list[int], int]] = [
        ("rows", DTYPES[identity.dtype][0], [rows, identity.hidden_size], rows * identity.row_bytes),
        *((name, "I64", [samples], 8 * samples) for name in _PER_SAMPLE),
        *((name, "I64", [runs], 8 * runs) for name in _PER_RUN),
        ("index_crc32", "U32", [1], 4),
        ("row_crc32", "U32", [rows], 4 * rows),
    ]
    described: dict[str, Any] = {
        "__metadata__": {"asft_reference_cache": str(FORMAT_VERSION), "identity": identity_json}
    }
    end = 0
    for name, dtype, shape, size in table:
        start, end = end, end + size
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    room = HEADER_BYTES - 8
    if len(text) > room:
        raise ValueError(f"the cache's identity is too long for a shard's header: {identity_json}")
    return struct.pack("<Q", room) + text.ljust(room)


def read_index(path: Path, identity: CacheIdentity) -> ShardIndex:
    """Reads and checks header and index of a complete shard; rows are not looked at.

    Raises:
        DamagedShard: the file is gone, is shorter or longer than its header says, a byte of header or index differs
            from what was written, or it belongs to another cache.
        UnreadableShard: the system refuses to hand it out.
    """
    try:
        with path.open("rb") as stream:
            header = stream.read(HEADER_BYTES)
            size = os.fstat(stream.fileno()).st_size
            samples, runs, rows = _counts(path, header, identity)
            start = HEADER_BYTES + rows * identity.row_bytes
            index_bytes = 8 * (3 * samples + 2 * runs)
            if size != start + index_bytes + 4 + 4 * rows:
                expected = start + index_bytes + 4 + 4 * rows
                raise DamagedShard(path, f"it has {size} bytes where its header says {expected}")
            stream.seek(start)
            index = stream.read(index_bytes)
            stored = stream.read(4)
    except OSError as error:
        raise refused(path, error) from error
    if struct.pack("<I", zlib.crc32(index, zlib.crc32(header))) != stored:
        raise DamagedShard(path, "the checksum of its index does not match")
    lengths = [samples, samples, samples, runs, runs]
    arrays = np.split(np.frombuffer(index, dtype="<i8").astype(np.int64), np.cumsum(lengths)[:-1])
    found = ShardIndex(ShardFile(path, size, rows, identity.row_bytes), *arrays)
    if not (found.row_counts.sum() == rows == found.run_lengths.sum() and found.run_counts.sum() == runs):
        raise DamagedShard(path, "its index contradicts itself")
    return found


def _counts(path: Path, header: bytes, identity: CacheIdentity) -> tuple[int, int, int]:
    """Examples, runs and rows, from a header that must be byte for byte the one such a shard has."""
    try:
        described: dict[str, Any] = json.loads(header[8:])
        owner = described["__metadata__"]["identity"]
        samples, runs, rows = (
            int(described[name]["shape"][0]) for name in ("sample_ids", "run_starts", "rows")
        )
        owner_identity = CacheIdentity(**json.loads(owner))
        intact = (
            header == _header(owner, owner_identity, samples, runs, rows) and min(samples, runs, rows) >= 0
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        raise DamagedShard(path, "its header is not as it was written") from None
    if not intact:
        raise DamagedShard(path, "its header is not as it was written")
    found = differences(json.loads(owner), identity)
    if found:
        raise ForeignShard(path, f"it belongs to another cache: {'; '.join(found)}")
    return samples, runs, rows


class ShardMap:
    """A complete shard's rows and their checksums, mapped into memory.

    Attributes:
        rows: uint8 `[n, row bytes]`, read from disk when touched.
        row_crc32: uint32 `[n]`, likewise.
    """

    def __init__(self, file: ShardFile):
        """Maps the file.

        Raises:
            DamagedShard: it is gone, or no longer has the size it had when its index was read.
            UnreadableShard: the system refuses to open or to map it.
        """
        self.file = file
        try:
            with file.path.open("rb") as stream:
                self._check_size(os.fstat(stream.fileno()).st_size)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise refused(file.path, error) from error
        # Readahead would fetch the neighbours of scattered rows, too: what is wanted is announced instead.
        self._map.madvise(mmap.MADV_RANDOM)
        rows: Bytes = np.frombuffer(self._map, np.uint8, file.num_rows * file.row_bytes, HEADER_BYTES)
        self.rows = rows.reshape(file.num_rows, file.row_bytes)
        self.row_crc32: UInt32s = np.frombuffer(
            self._map, "<u4", file.num_rows, file.bytes - 4 * file.num_rows
        )

    def _check_size(self, size: int) -> None:
        if size != self.file.bytes:
            raise DamagedShard(self.file.path, f"it has {size} bytes where it had {self.file.bytes}")

    def check_size(self) -> None:
        """Refuses a file that was cut since it was mapped: touching a page beyond its end would kill the process."""
        try:
            self._check_size(self.file.path.stat().st_size)
        except OSError as error:
            raise refused(self.file.path, error) from error

    def announce(self, first: int, count: int) -> None:
        """Asks the kernel to start reading these rows."""
        start = HEADER_BYTES + first * self.file.row_bytes
        page = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, start - page + count * self.file.row_bytes)

    def forget(self) -> None:
        """Unmaps the pages touched so far; they stay in the kernel's page cache, not in this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)
