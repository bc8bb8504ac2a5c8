"""Safetensors files read and written by blocks of rows.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then
the data. Reading goes through `preadv` into the caller's memory rather than a memory map, so that a
conversion's resident memory stays at the block it holds; writing lays the header down first, since all shapes
are known, and then appends. Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch

from asft_nemo.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        path: its file.
        offset: first byte in that file.
        dtype: torch dtype.
        shape: its shape.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Returns a contiguous CPU tensor's bytes, without copying."""
    array = cast(Any, tensor.reshape(-1).view(torch.uint8)).numpy()
    return memoryview(array)


def read_into(descriptor: int, offset: int, target: torch.Tensor, *, path: Path) -> None:
    """Fills a contiguous tensor with the bytes of a file at `offset`.

    Raises:
        CheckpointError: the file ends too early.
    """
    view = byte_view(target)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path} ends too early (truncated): copy or download the file again")
        done += count


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Returns the tensors of one safetensors file, whose header must describe exactly the bytes there.

    Raises:
        CheckpointError: the file is truncated, its header is malformed, or offsets do not fit.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is not a complete safetensors file: copy or download the file again"
            )
        try:
            found: Any = json.loads(stream.read(length))
            if not isinstance(found, dict):
                raise TypeError("it is no JSON object")
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} has a malformed header ({error}): copy or download the file again"
            ) from error
    header = cast(dict[str, Any], found)
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int]] = []
    for name, value in header.items():
        try:
            dtype, shape = DTYPES[value["dtype"]], tuple(int(dim) for dim in value["shape"])
            start, stop = (int(offset) for offset in value["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: the header entry of '{name}' is malformed or of an unsupported dtype ({error!r}):"
                " copy or download the file again"
            ) from error
        entry = TensorEntry(path=path, offset=8 + length + start, dtype=dtype, shape=shape)
        if stop - start != entry.nbytes or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: '{name}' claims {stop - start} bytes where its shape needs {entry.nbytes}:"
                " copy or download the file again"
            )
        entries[name] = entry
        spans.append((start, stop))
    _check_spans(path, spans, size - 8 - length)
    return entries


def _check_spans(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(
                f"{path}: its tensors overlap or leave a gap at byte {end}: copy or download it again"
            )
        end = stop
    if end != data_bytes:
        raise CheckpointError(
            f"{path} holds {data_bytes} bytes of tensors where its header names {end} (truncated or padded):"
            " copy or download the file again"
        )


class ClosesFiles(ABC):
    """Something with files open, for a `with` statement."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsReader(ClosesFiles):
    """The tensors of a Hugging Face checkpoint directory, one file or several with an index.

    Thread safe: reads carry their own offset.
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads the headers.

        Raises:
            CheckpointError: no safetensors files, a broken index, or a broken file.
        """
        self.directory = Path(directory)
        self.tensors: dict[str, TensorEntry] = {}
        self._descriptors: dict[Path, int] = {}
        index_path = self.directory / INDEX_NAME
        single = self.directory / SINGLE_NAME
        if single.is_file():  # first, as transformers does
            self.tensors = read_header(single)
        elif index_path.is_file():
            self._read_index(index_path)
        else:
            raise CheckpointError(
                f"{self.directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}: convert the weights to"
                " safetensors"
                " first (other formats can run code when they are read)"
            )
        for path in {entry.path for entry in self.tensors.values()}:
            self._descriptors[path] = os.open(path, os.O_RDONLY)

    def _read_index(self, index_path: Path) -> None:
        try:
            weight_map: Any = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError("a file name is no text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{index_path} is not a weight index ({error!r}): fetch it again"
            ) from error
        for file_name in files:
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index_path} points to '{file_name}', which is no safetensors file of this directory:"
                    " do not use it"
                )
            path = self.directory / file_name
            if not path.is_file():
                raise CheckpointError(
                    f"{index_path} names {file_name}, which is missing: download it as well"
                )
            entries = read_header(path)
            named = {name for name, where in weight_map.items() if where == file_name}
            if named != set(entries):
                wrong = ", ".join(sorted(named ^ set(entries))[:5])
                raise CheckpointError(
                    f"{index_path} and {file_name} disagree on which tensors it holds ({wrong}): fetch both"
                    " again"
                )
            self.tensors |= entries

    def read_rows(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fills `target` (contiguous, of the tensor's dtype) with the rows from `start` on."""
        entry = self.tensors[name]
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        read_into(self._descriptors[entry.path], entry.offset + start * row_bytes, target, path=entry.path)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Returns length and header of a safetensors file that will hold these tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Returns file name -> tensor names, filling files in order; a larger tensor gets its own.

    Args:
        sizes: bytes per tensor, in the order they are to be written.
        max_shard_bytes: the limit.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def index_text(shards: Mapping[str, Sequence[str]], total_bytes: int) -> str:
    """Returns the text of `model.safetensors.index.json`."""
    pairs: Iterator[tuple[str, str]] = ((name, file) for file, names in shards.items() for name in names)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(pairs))}
    return json.dumps(index, indent=2) + "\n"
