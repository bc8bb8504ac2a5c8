"""Safetensors files written side by side, block by block, from whatever makes the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from asft_nemo.checkpoint.blocks import BLOCK_BYTES, COMPLETE_BEFORE, ProgressCounter, threads
from asft_nemo.checkpoint.journal import Journal
from asft_nemo.checkpoint.mapping import row_blocks
from asft_nemo.checkpoint.safetensors_io import byte_view, header_bytes

#: (tensor, first row, stop row) -> contiguous `[rows, ...]` of the tensor's dtype; called from several threads
ProduceRows = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class OutRows:
    """One tensor to write.

    Attributes:
        dtype: its dtype in the file.
        shape: its shape.
        widest: bytes of a number in the widest dtype it passes through on the way.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    widest: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return torch.Size(self.shape[1:]).numel() * max(self.widest, self.dtype.itemsize)


def write_shards(
    directory: Path,
    shards: Mapping[str, Sequence[str]],
    tensors: Mapping[str, OutRows],
    produce: ProduceRows,
    counter: ProgressCounter,
    journal: Journal | None = None,
) -> None:
    """Writes safetensors files, several at a time, and syncs them. Memory: a few blocks of 64 MB per thread.

    Args:
        directory: where they go.
        shards: file name -> names of its tensors, in order.
        tensors: name -> what it is.
        produce: makes the rows.
        counter: told what is written.
        journal: which files are complete already; new ones are noted there.
    """

    def write(file_name: str, names: Sequence[str]) -> None:
        if journal is not None and journal.facts(file_name) is not None:
            counter.add(sum(tensors[name].nbytes for name in names), COMPLETE_BEFORE)
            return
        described = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        with (directory / file_name).open("wb") as stream:
            stream.write(header_bytes(described))
            for name in names:
                for start, stop in row_blocks(tensors[name].shape[0], tensors[name].row_bytes, BLOCK_BYTES):
                    block = produce(name, start, stop)
                    stream.write(byte_view(block))
                    counter.add(block.nbytes, name)
            stream.flush()
            os.fsync(stream.fileno())
        if journal is not None:
            journal.add(file_name, len(names))

    with ThreadPoolExecutor(max_workers=threads()) as pool:
        futures = [pool.submit(write, file_name, names) for file_name, names in shards.items()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
