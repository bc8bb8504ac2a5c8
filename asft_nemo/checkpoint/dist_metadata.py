"""What `.metadata` of a torch distributed checkpoint says, read without running its pickle.

Only names that torch and Megatron-core write are accepted. The classes here stand for those of `torch.distributed.checkpoint.metadata` (torch 2.13) of the same names and hold the same fields. Nothing of
that package is imported: it takes a second, and a pickle can then make nothing but these plain values.
"""

from __future__ import annotations

import collections
import pickle  # nosec B403 # for an unpickler that makes plain values only
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asft_nemo.errors import CheckpointError


@dataclass
class ChunkStorageMetadata:
    """Where a chunk lies in its tensor: first index and size in each dim."""

    offsets: torch.Size
    sizes: torch.Size


@dataclass
class TensorProperties:
    """A tensor's dtype; what else a pickle says of it is not read."""

    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


@dataclass
class TensorStorageMetadata:
    """A tensor on disk: dtype, shape and chunks."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class MetadataIndex:
    """A chunk's key: the tensor's name and the chunk's offsets."""

    fqn: str
    offset: torch.Size | None = None
    index: int | None = field(hash=False, compare=False, default=None)


@dataclass
class StorageInfo:
    """Where a chunk lies on disk: file, first byte, bytes."""

    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata:
    """Everything: name -> tensor (or something inert, for objects), and chunk -> place."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[MetadataIndex, StorageInfo]


class _Inert:
    """Stands for any class that is not needed: it accepts what a pickle gives it and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


_TORCH = "torch.distributed.checkpoint"
_CLASSES: dict[tuple[str, str], Any] = {
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{_TORCH}.metadata", "TensorProperties"): TensorProperties,
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{_TORCH}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{_TORCH}.metadata", "Metadata"): Metadata,
    (f"{_TORCH}.filesystem", "_StorageInfo"): StorageInfo,
    # Megatron-core's own class adds a field we do not need.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


# What torch and Megatron-core write besides and nobody here reads. Megatron's own loader runs the pickle, so anything else is refused.
_UNREAD = {
    (f"{_TORCH}.metadata", "BytesStorageMetadata"),
    (f"{_TORCH}.metadata", "StorageMeta"),
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_TORCH}.filesystem", "_StoragePrefix"),
    (f"{_TORCH}.planner", "SavePlan"),
    (f"{_TORCH}.planner", "TensorWriteData"),
    (f"{_TORCH}.planner", "WriteItem"),
    (f"{_TORCH}.planner", "WriteItemType"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    ("pathlib", "PurePosixPath"),
    ("torch.serialization", "_get_layout"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _UNREAD:
            return _Inert
        if (module, name) not in _CLASSES:
            raise _ForeignName(f"{module}.{name}")
        return _CLASSES[module, name]


class _ForeignName(Exception):
    """A pickle names something that no checkpoint needs."""


def _check(loaded: Any) -> None:
    """Checks that every entry is what its place asks for.

    Raises:
        TypeError, AttributeError: one is not.
    """
    for key, value in loaded.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a tensor is called {key!r}")
        if isinstance(value, TensorStorageMetadata):
            dtype: Any = value.properties.dtype
            sizes: list[Any] = [
                value.size,
                *(size for chunk in value.chunks for size in (chunk.offsets, chunk.sizes)),
            ]
            fits = all(isinstance(size, torch.Size) and len(size) == len(value.size) for size in sizes)
            if not isinstance(dtype, torch.dtype) or not fits:
                raise TypeError(f"{key} has no dtype or shape")
    for place in loaded.storage_data.values():
        if not (
            isinstance(place.relative_path, str)
            and isinstance(place.offset, int)
            and isinstance(place.length, int)
        ):
            raise TypeError("a chunk has no place")


def read_metadata(weights_dir: Path) -> Metadata:
    """Returns the metadata of a torch distributed checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = weights_dir / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            f"{weights_dir} holds no distributed checkpoint (.metadata is missing): give the directory of a checkpoint that was written to "
            "its end"
        )
    try:
        with path.open("rb") as stream:
            loaded = _Unpickler(stream).load()
        if not isinstance(loaded, Metadata):
            raise TypeError("it describes no checkpoint")
        _check(loaded)
    except _ForeignName as error:
        raise CheckpointError(
            f"{path} names {error}, which no checkpoint needs: do not use this checkpoint"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): copy the checkpoint again") from error
    return loaded
