"""Reading blocks of rows from a torch distributed checkpoint without running its pickles.

Two pickles lie in such a checkpoint: `.metadata` (see `dist_metadata`), which says what tensors there are and where their chunks
lie, and one small one inside every chunk (a chunk is a `torch.save` archive: a zip file whose records are
stored uncompressed). Both are read with unpicklers that build plain values only. The numbers themselves are
read straight from the file, just the rows asked for, so that even a chunk that holds a whole embedding costs
no memory.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import os
import pickle  # nosec B403 # for an unpickler that makes plain values only
import struct
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asft_nemo.checkpoint.dist_metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
    read_metadata,
)
from asft_nemo.checkpoint.safetensors_io import ClosesFiles, read_into
from asft_nemo.checkpoint.seal import SEAL, check_seal
from asft_nemo.errors import CheckpointError

_BLOCK = 1 << 22

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


@dataclass(frozen=True)
class _Record:
    """Where a chunk's numbers lie: file, first byte, dtype."""

    path: Path
    offset: int
    dtype: torch.dtype


def _plain_tensor(storage: tuple[str, torch.dtype], offset: int, size: Any, stride: Any, *_: Any) -> Any:
    return (*storage, offset, tuple(size), tuple(stride))


def _plain_parameter(data: Any, *_: Any) -> Any:
    return data


class _ChunkUnpickler(pickle.Unpickler):
    """Reads the small pickle of a saved tensor into (storage key, dtype, storage offset, size, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _plain_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _plain_parameter
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return key, dtype


class _FileSpan(io.RawIOBase):
    """A part of a file as a seekable stream of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        data = os.pread(self._descriptor, count, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class DistReader(ClosesFiles):
    """The tensors of a torch distributed checkpoint. Thread safe."""

    def __init__(self, weights_dir: str | Path, *, summed: bool = False) -> None:
        """Reads the metadata.

        Args:
            weights_dir: the directory.
            summed: read the whole of a chunk, once, before any of its rows, and hold it against the CRC-32 that torch stored with it.

        Raises:
            CheckpointError: the directory holds no complete distributed checkpoint, or its files are not as they were written.
        """
        self.weights_dir = Path(weights_dir)
        check_seal(self.weights_dir.parent)
        # Others may have told torch to store no sums (`torch.serialization.set_crc32_options`).
        self._sums = (self.weights_dir.parent / SEAL).is_file()
        self._summed = summed and self._sums
        loaded = read_metadata(self.weights_dir)
        self._storage = loaded.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in loaded.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._descriptors: dict[Path, int] = {}
        self._records: dict[MetadataIndex, _Record] = {}
        self._lock = threading.Lock()

    def dtype(self, key: str) -> torch.dtype:
        """Returns a tensor's dtype on disk."""
        return self.tensors[key].properties.dtype

    def read_rows(self, key: str, layer: int | None, start: int, target: torch.Tensor) -> None:
        """Fills `target` with the rows of one layer, or of a tensor without a layer dim, from `start` on.

        Args:
            key: the tensor.
            layer: index into the leading layer dim, None where the tensor has none.
            start: first row.
            target: contiguous `[rows, ...]`, of the dtype on disk.

        Raises:
            CheckpointError: a file is missing or truncated, or chunks do not cover the rows.
        """
        lead = () if layer is None else (layer,)
        low = (*lead, start, *(0 for _ in target.shape[1:]))
        high = (*(index + 1 for index in lead), start + target.shape[0], *target.shape[1:])
        covered = 0
        for chunk in self.tensors[key].chunks:
            begin = [max(a, b) for a, b in zip(low, chunk.offsets, strict=True)]
            end = [min(a, b + size) for a, b, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            box = [b - a for a, b in zip(begin, end, strict=True)]
            inside = [a - b for a, b in zip(begin, chunk.offsets, strict=True)]
            piece = target
            for dim, (a, b, size) in enumerate(
                zip(begin[len(lead) :], low[len(lead) :], box[len(lead) :], strict=True)
            ):
                piece = piece.narrow(dim, a - b, size)
            self._read_box(key, chunk, inside, len(lead), piece)
            covered += math.prod(box)
        if covered != target.numel():
            raise CheckpointError(
                f"{self.weights_dir}: the chunks of {key} do not cover rows {start} to"
                f" {start + target.shape[0]} once:"
                " copy the checkpoint again"
            )

    def _read_box(
        self,
        key: str,
        chunk: ChunkStorageMetadata,
        inside: list[int],
        lead: int,
        piece: torch.Tensor,
    ) -> None:
        """Reads whole rows of a chunk, then takes from them the columns that `piece` wants."""
        record = self._record(MetadataIndex(key, chunk.offsets), chunk)
        row_shape = tuple(chunk.sizes[lead + 1 :])
        row_numel = math.prod(row_shape)
        row = inside[lead] if lead == 0 else inside[0] * chunk.sizes[1] + inside[1]
        offset = record.offset + row * row_numel * record.dtype.itemsize
        descriptor = self._descriptors[record.path]
        if tuple(piece.shape[1:]) == row_shape and piece.is_contiguous():
            read_into(descriptor, offset, piece, path=record.path)
            return
        rows = torch.empty((piece.shape[0], *row_shape), dtype=record.dtype)
        read_into(descriptor, offset, rows, path=record.path)
        for dim, (first, size) in enumerate(zip(inside[lead + 1 :], piece.shape[1:], strict=True), start=1):
            rows = rows.narrow(dim, first, size)
        piece.copy_(rows)

    def _record(self, index: MetadataIndex, chunk: ChunkStorageMetadata) -> _Record:
        with self._lock:
            if index not in self._records:
                self._records[index] = self._locate(index, chunk)
            return self._records[index]

    def _locate(self, index: MetadataIndex, chunk: ChunkStorageMetadata) -> _Record:
        info = self._storage.get(index)
        if info is None:
            raise CheckpointError(
                f"{self.weights_dir}: .metadata does not say where a chunk of {index.fqn} lies: copy the checkpoint again"
            )
        path, descriptor = self._open(index, info)
        dtype = self.dtype(index.fqn)
        try:
            archive = _archive(descriptor, info)
            if self._summed:
                _check_sums(archive)
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            key, stored, first, size, stride = _ChunkUnpickler(io.BytesIO(archive.read(pickled))).load()
            record = archive.getinfo(f"{pickled.removesuffix('data.pkl')}data/{key}")
            local = os.pread(descriptor, 30, info.offset + record.header_offset)
            name_length, extra_length = struct.unpack("<HH", local[26:30])
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}: the chunk of {index.fqn} cannot be read ({error!r}): copy the checkpoint again"
            ) from error
        contiguous = tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))
        plain = all(a == b or n == 1 for a, b, n in zip(stride, contiguous, size, strict=True))
        numel = math.prod(chunk.sizes)
        if (
            stored != dtype
            or not plain
            or math.prod(size) != numel
            or record.compress_type != zipfile.ZIP_STORED
        ):
            raise CheckpointError(
                f"{path}: the chunk of {index.fqn} is stored in a form that cannot be read by rows: save the"
                " checkpoint again with this project's stack"
            )
        data = info.offset + record.header_offset + 30 + name_length + extra_length
        return _Record(path=path, offset=data + first * dtype.itemsize, dtype=dtype)

    def _open(self, index: MetadataIndex, info: StorageInfo) -> tuple[Path, int]:
        path = self.weights_dir / info.relative_path
        if Path(info.relative_path).name != info.relative_path or not path.is_file():
            raise CheckpointError(
                f"{self.weights_dir}: the file {info.relative_path} of {index.fqn} is missing: copy the"
                " checkpoint again"
            )
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return path, self._descriptors[path]

    def check_numbers(self, *, part: int = 0, parts: int = 1) -> None:
        """Reads one of `parts` parts of everything, objects and optimizer state included, and holds it against the stored CRC-32.

        torch's own loader looks at none of them (torch 2.13). Does nothing where the checkpoint has no seal.

        Raises:
            CheckpointError: a chunk is not as it was written.
        """
        if not self._sums:
            return
        places = sorted(self._storage.items(), key=lambda item: (item[1].relative_path, item[1].offset))
        for index, info in places[part::parts]:
            path, descriptor = self._open(index, info)
            try:
                _check_sums(_archive(descriptor, info))
            except Exception as error:
                raise _damaged(path, index, error) from error

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@functools.cache
def check_before_load(weights_dir: Path, rank: int, ranks: int) -> None:
    """Holds a rank's share of a checkpoint against its checksums, once a process; for Megatron's loader, which looks at none.

    Raises:
        CheckpointError: a file is not as it was written.
    """
    with DistReader(weights_dir) as reader:
        reader.check_numbers(part=rank, parts=ranks)


def _archive(descriptor: int, info: StorageInfo) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BufferedReader(_FileSpan(descriptor, info.offset, info.length), 4096))


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Reads every record of a chunk.

    Raises:
        zipfile.BadZipFile: its bytes have another CRC-32 than was stored.
    """
    for record in archive.infolist():
        with archive.open(record) as stream:
            while stream.read(_BLOCK):
                pass


def _damaged(path: Path, index: MetadataIndex, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: the chunk of {index.fqn} cannot be read ({error}): copy the checkpoint again"
    )
