"""Writing a torch distributed checkpoint by blocks of rows, as Megatron-core's `dist_checkpointing` reads it.

`torch.distributed.checkpoint` asks a planner for the data of one write item at a time, so nothing but the
block being written is in memory. On disk a tensor's chunks may have any shape: Megatron reassembles whatever
its layout asks for.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]  # what every reader expects in .metadata
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from asft_nemo.checkpoint.journal import Journal
from asft_nemo.checkpoint.mapping import row_blocks
from asft_nemo.checkpoint.staging import write_synced

# What Megatron-core's own checkpoints carry beside the tensors.
MEGATRON_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What NeMo's strategy records of how it names things, for a checkpoint without optimizer state.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

Produce = Callable[[str, int, int, int], torch.Tensor]


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write.

    Attributes:
        key: its name on disk.
        dtype: its dtype on disk.
        layers: size of the leading layer dim, None for a tensor without one.
        shape: shape of one layer's slice, or of the whole tensor.
    """

    key: str
    dtype: torch.dtype
    layers: int | None
    shape: tuple[int, ...]

    @property
    def global_shape(self) -> torch.Size:
        """Shape on disk."""
        return torch.Size(self.shape if self.layers is None else (self.layers, *self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.global_shape.numel() * self.dtype.itemsize


class BlockSavePlanner(SavePlanner):
    """Lists one write item per block of rows and resolves each when it is about to be written."""

    def __init__(
        self,
        tensors: Sequence[OutTensor],
        *,
        objects: Mapping[str, bytes],
        produce: Produce,
        block_bytes: int,
    ) -> None:
        """Plans the blocks.

        Args:
            tensors: what to write.
            objects: key -> serialised object.
            produce: (key, layer, first row, stop row) -> a contiguous tensor `[rows, ...]` of the tensor's
                dtype, in memory of its own. Called from several threads.
            block_bytes: upper bound of one block.
        """
        self._tensors = tensors
        self._objects = objects
        self._produce = produce
        self._chunks = {tensor.key: _chunks(tensor, block_bytes) for tensor in tensors}
        self._stacked = {tensor.key: tensor.layers is not None for tensor in tensors}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to set up: the state dict is empty."""

    def create_local_plan(self) -> SavePlan:
        """Returns one item per block and per object."""
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO, tensor_data=None)
            for key in self._objects
        ]
        for tensor in self._tensors:
            items += [
                WriteItem(
                    index=MetadataIndex(tensor.key, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=chunk,
                        properties=TensorProperties(dtype=tensor.dtype),
                        size=tensor.global_shape,
                    ),
                )
                for chunk in self._chunks[tensor.key]
            ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Returns the plans unchanged, and the description of what they write."""
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            tensor.key: TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=tensor.global_shape,
                chunks=self._chunks[tensor.key],
            )
            for tensor in self._tensors
        }
        described |= {key: BytesStorageMetadata() for key in self._objects}
        return all_plans, Metadata(state_dict_metadata=described)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns the plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Returns the block's data, `[1, rows, ...]` for a tensor with a layer dim."""
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[key])
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        stacked = self._stacked[key]
        layer, row = (chunk.offsets[0], chunk.offsets[1]) if stacked else (0, chunk.offsets[0])
        rows = chunk.sizes[1] if stacked else chunk.sizes[0]
        return self._produce(key, layer, row, row + rows).reshape(chunk.sizes)

    def nbytes(self, write_item: WriteItem) -> int:
        """Bytes of an item's numbers; 0 for an object."""
        if write_item.tensor_data is None:
            return 0
        return write_item.tensor_data.chunk.sizes.numel() * write_item.tensor_data.properties.dtype.itemsize

    def file_of(self, write_item: WriteItem) -> str:
        """Returns what decides the file of an item: its layer, else its name."""
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return "objects"
        return (
            f"layer {write_item.index.offset[0]}" if self._stacked[key] and write_item.index.offset else key
        )


def _chunks(tensor: OutTensor, block_bytes: int) -> list[ChunkStorageMetadata]:
    rows, row_shape = tensor.shape[0], tensor.shape[1:]
    row_bytes = torch.Size(row_shape).numel() * tensor.dtype.itemsize
    chunks: list[ChunkStorageMetadata] = []
    for layer in range(tensor.layers or 1):
        for start, stop in row_blocks(rows, row_bytes, block_bytes):
            offsets, sizes = (start, *(0 for _ in row_shape)), (stop - start, *row_shape)
            if tensor.layers is not None:
                offsets, sizes = (layer, *offsets), (1, *sizes)
            chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
    return chunks


class LayerFileWriter(FileSystemWriter):
    """One file per layer, written by several threads; an error in any of them ends the save.

    The stock writer keeps the last tensor of every name until its file is closed and loses errors of its
    helper threads.
    """

    def __init__(
        self, path: Path, *, threads: int, journal: Journal | None, skipped: Callable[[int], None]
    ) -> None:
        """Writes into `path` with `threads` threads; files the journal knows are left as they are, `skipped` told their bytes."""
        super().__init__(path, sync_files=True)  # pyright: ignore[reportUnknownMemberType]
        self._directory, self._threads = path, threads
        self._journal, self._skipped = journal, skipped

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes every item; returns a finished future of where each one lies."""
        assert isinstance(planner, BlockSavePlanner)
        files: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            files.setdefault(planner.file_of(item), []).append(item)

        def place(name: str, items: list[WriteItem]) -> list[list[int]]:
            """Offset and length of each item in its file, which is written unless it is complete already."""
            recorded = f"{self._directory.name}/{name}"
            known = None if self._journal is None else self._journal.facts(recorded)
            if known is not None:
                self._skipped(sum(planner.nbytes(item) for item in items))
                return known
            places: list[list[int]] = []
            with (self._directory / name).open("wb") as stream:
                for item in items:
                    offset = stream.tell()
                    data = planner.resolve_data(item)
                    if isinstance(data, torch.Tensor):
                        _save(data, stream)
                    else:
                        stream.write(data.getbuffer())
                    places.append([offset, stream.tell() - offset])
                stream.flush()
                os.fsync(stream.fileno())
            if self._journal is not None:
                self._journal.add(recorded, places)
            return places

        def write(number: int, items: list[WriteItem]) -> list[WriteResult]:
            name = f"__0_{number}.distcp"
            return [
                WriteResult(
                    index=item.index,
                    size_in_bytes=length,
                    storage_data=_StorageInfo(relative_path=name, offset=offset, length=length),
                )
                for item, (offset, length) in zip(items, place(name, items), strict=True)
            ]

        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            futures = [pool.submit(write, number, items) for number, items in enumerate(files.values())]
            try:
                results = [result for future in futures for result in future.result()]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Told:
    """A stream that remembers why it could not be written to: torch's archive ends with a `RuntimeError` of its own instead (torch 2.13)."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _save(tensor: torch.Tensor, stream: IO[bytes]) -> None:
    """`torch.save`, whose error is the system's where the system refused.

    Raises:
        OSError: a full disk, a limit.
    """
    told = _Told(stream)
    try:
        torch.save(tensor, cast(IO[bytes], told))
    except RuntimeError as error:
        if told.error is None:
            raise
        raise told.error from error


def write_dist_checkpoint(
    weights_dir: Path,
    tensors: Sequence[OutTensor],
    *,
    objects: Sequence[str],
    produce: Produce,
    block_bytes: int,
    threads: int,
    journal: Journal | None = None,
    skipped: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes tensors, empty objects, and the two files Megatron-core wants beside them.

    Args:
        weights_dir: directory to create.
        tensors: what to write.
        objects: keys of objects to write as empty ones, as Megatron writes a module without extra state.
        produce: see `BlockSavePlanner`.
        block_bytes: upper bound of one block in memory and on disk.
        threads: files written at the same time.
        journal: of the directory above `weights_dir`: which files are complete, and where new ones are noted.
        skipped: told the bytes of numbers in files that were complete.
    """
    empty = io.BytesIO()
    torch.save([None], empty)
    planner = BlockSavePlanner(
        tensors,
        objects={key: empty.getvalue() for key in objects},
        produce=produce,
        block_bytes=block_bytes,
    )
    weights_dir.mkdir(parents=True, exist_ok=journal is not None)
    writer = LayerFileWriter(weights_dir, threads=threads, journal=journal, skipped=skipped)
    with warnings.catch_warnings():
        # It tells everybody who saves from one process that this is what it will do.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            # It wraps whatever went wrong, a full disk too, in a BaseException of its own.
            raise next(iter(error.failures.values()))[0] from error
    common = io.BytesIO()
    torch.save({"content_metadata": dict(CONTENT_METADATA)}, common)
    write_synced(weights_dir / "common.pt", common.getvalue())
    write_synced(weights_dir / "metadata.json", json.dumps(MEGATRON_METADATA).encode())
