"""Blocks of rows assembled from one side's files for the other side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

import torch

from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import HfTensor, hf_name, mappings_of
from asft_nemo.checkpoint.mapping import TensorMapping, hf_runs, megatron_runs
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader
from asft_nemo.model import ModelSpec

MODULE_PREFIX = "module."
BLOCK_BYTES = 64 * 2**20
COMPLETE_BEFORE = "complete before"  # what progress calls files that an interrupted conversion had finished
_THREADS = 4

Progress = Callable[[int, int, str], None]


def threads() -> int:
    """Files read or written at the same time."""
    return max(1, min(_THREADS, os.cpu_count() or 1))


class ProgressCounter:
    """Adds up what several threads have done and hands it to the caller's progress function."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int, what: str) -> None:
        """Reports `nbytes` more, of `what`."""
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total, what)


def megatron_blocks(
    reader: SafetensorsReader,
    spec: ModelSpec,
    dtypes: Mapping[str, torch.dtype],
    counter: ProgressCounter,
) -> Callable[[str, int, int, int], torch.Tensor]:
    """Returns the function that assembles one block of a Megatron tensor from the Hugging Face files."""
    table: dict[str, TensorMapping] = {
        MODULE_PREFIX + mapping.megatron: mapping for mapping in mappings_of(spec)
    }
    segments = {key: mapping.segments() for key, mapping in table.items()}

    def produce(key: str, layer: int, start: int, stop: int) -> torch.Tensor:
        block = torch.empty((stop - start, *table[key].row_shape), dtype=dtypes[key])
        for run in hf_runs(segments[key], start, stop):
            name = hf_name(run.name, layer)
            rows, dtype = block[run.into : run.into + run.rows], reader.tensors[name].dtype
            if dtype == block.dtype:
                reader.read_rows(name, run.start, rows)
            else:
                stored = torch.empty(rows.shape, dtype=dtype)
                reader.read_rows(name, run.start, stored)
                rows.copy_(stored)
        counter.add(block.nbytes, key)
        return block

    return produce


def hf_block(
    reader: DistReader, tensor: HfTensor, start: int, stop: int, *, dtype: torch.dtype
) -> torch.Tensor:
    """Returns rows `start:stop` of a Hugging Face tensor, read from a distributed checkpoint, as `dtype`."""
    mapping = tensor.mapping
    key = MODULE_PREFIX + mapping.megatron
    block = torch.empty((stop - start, *mapping.row_shape), dtype=reader.dtype(key))
    layer = tensor.layer if mapping.per_layer else None
    for run in megatron_runs(mapping.segments(), tensor.template, start, stop, megatron=key):
        reader.read_rows(key, layer, run.start, block[run.into : run.into + run.rows])
    return block.to(dtype)


def widest_itemsize(reader: DistReader, tensor: HfTensor, dtype: torch.dtype) -> int:
    """Returns the larger of the bytes per number read and written, so that a block bounds both."""
    return max(dtype.itemsize, reader.dtype(MODULE_PREFIX + tensor.mapping.megatron).itemsize)
