"""Hugging Face checkpoints in and out of torch distributed checkpoints, with no model in memory."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.dist_write import OutTensor, write_dist_checkpoint
from asft_nemo.checkpoint.families import (
    EXTRA_STATE,
    EXTRA_STATE_PER_LAYER,
    HF_EMBEDDING,
    HF_HEAD,
    HfTensor,
    hf_name,
    hf_tensors,
    ignored_hf_names,
    layers_of,
    mappings_of,
)
from asft_nemo.checkpoint.mapping import TensorMapping, Vocabulary, hf_runs, megatron_runs, row_blocks
from asft_nemo.checkpoint.safetensors_io import (
    INDEX_NAME,
    SafetensorsReader,
    byte_view,
    header_bytes,
    index_text,
    plan_shards,
)
from asft_nemo.checkpoint.staging import staged_directory, write_synced
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec, model_spec, read_hf_config, read_model_spec

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

MODULE_PREFIX = "module."
BLOCK_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 5_000_000_000
_THREADS = 4


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote.

    Attributes:
        path: the checkpoint directory.
        family: the model family.
        num_tensors: Hugging Face tensors read.
        nbytes: bytes of weights written.
        dtype: dtype of most of them.
        seconds: wall clock.
        files: names of the files copied unchanged.
    """

    path: Path
    family: str
    num_tensors: int
    nbytes: int
    dtype: torch.dtype
    seconds: float
    files: tuple[str, ...]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; fields as in `ImportReport`, `shards` counting the safetensors files."""

    path: Path
    family: str
    num_tensors: int
    nbytes: int
    dtype: torch.dtype
    seconds: float
    files: tuple[str, ...]
    shards: int


class _Counter:
    """Adds up what several threads have done and hands it to the caller's progress function."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int, what: str) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total, what)


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Writes a Hugging Face checkpoint as a NeMo checkpoint that any layout of the model can load.

    `out_dir` receives `weights/` (a torch distributed checkpoint with the names Megatron's GPTModel asks for
    inside NeMo, the same with local and Transformer Engine layers), `context/hf/` (every file that is not a
    weight, unchanged) and `context/asft.json`. It appears complete or not at all. Memory: a few blocks of 64
    MB per thread, whatever the model.

    Args:
        hf_dir: directory with config.json and safetensors.
        out_dir: directory to create.
        dtype: dtype to write, for example "bf16"; None keeps every tensor's own.
        progress: called with (bytes done, bytes in all, what was just written), from several threads but one
            at a time.

    Raises:
        CheckpointError: the source is incomplete or of an unknown family, tensors are missing, left over or
            of another shape, the target exists or cannot be written.
    """
    started = time.monotonic()
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    spec = read_model_spec(hf_dir)
    wanted = None if dtype is None else hf_files.parse_dtype(dtype)
    with SafetensorsReader(hf_dir) as reader:
        check_hf_tensors(reader, spec)
        dtypes = _source_dtypes(reader, spec, wanted)
        tensors = [
            OutTensor(
                key=MODULE_PREFIX + mapping.megatron,
                dtype=wanted or dtypes[mapping.megatron],
                layers=spec.num_layers if mapping.per_layer else None,
                shape=mapping.shape,
            )
            for mapping in mappings_of(spec)
        ]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        counter = _Counter(progress, nbytes)
        origin = _origin(spec, dtypes, reader)
        with staged_directory(out_dir, needed_bytes=nbytes) as staging:
            write_dist_checkpoint(
                staging / hf_files.WEIGHTS,
                tensors,
                objects=_extra_state_keys(spec),
                produce=_producer(reader, spec, {tensor.key: tensor.dtype for tensor in tensors}, counter),
                block_bytes=BLOCK_BYTES,
                threads=_threads(),
            )
            context = staging / hf_files.CONTEXT
            files = hf_files.copy_hf_files(hf_dir, context / hf_files.HF_FILES)
            hf_files.write_origin(context, origin)
    logger.info("imported %s to %s", hf_dir, out_dir)
    return ImportReport(
        path=out_dir,
        family=spec.family,
        num_tensors=len(hf_tensors(spec)),
        nbytes=nbytes,
        dtype=wanted or hf_files.parse_dtype(origin.source_dtype),
        seconds=time.monotonic() - started,
        files=tuple(files),
    )


def export_hf(
    ckpt_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    base_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes the weights of a NeMo checkpoint, trained at any layout, as a Hugging Face checkpoint.

    Only the model's tensors are read: optimizer state, random state and `_extra_state` are not. Padding rows
    of the vocabulary are cropped. The other files come from the base model unchanged, so config.json is the
    base's, byte for byte; only a `dtype` that differs from the base's is written into it.

    Args:
        ckpt_dir: directory with `weights/`.
        out_dir: directory to create; it appears complete or not at all.
        dtype: dtype to write; None takes the one the base model had.
        max_shard_bytes: upper bound of a safetensors file (one tensor may be larger).
        base_dir: Hugging Face directory to take the other files from; None takes the checkpoint's
            `context/hf`.
        progress: as in `import_hf`.

    Raises:
        CheckpointError: the checkpoint is incomplete, does not fit its config, or the target cannot be
            written.
    """
    started = time.monotonic()
    ckpt_dir, out_dir = Path(ckpt_dir), Path(out_dir)
    weights = hf_files.weights_directory(ckpt_dir)
    source = hf_files.hf_files_directory(ckpt_dir, base_dir)
    config = read_hf_config(source)
    spec = model_spec(config)
    with DistReader(weights) as reader:
        check_megatron_tensors(reader, spec)
        dtypes = _target_dtypes(ckpt_dir, reader, spec, config, dtype)
        tensors = hf_tensors(spec)
        sizes = {
            tensor.name: torch.Size(tensor.shape).numel() * dtypes[tensor.mapping.megatron].itemsize
            for tensor in tensors
        }
        nbytes = sum(sizes.values())
        shards = plan_shards(sizes, max_shard_bytes)
        counter = _Counter(progress, nbytes)
        with staged_directory(out_dir, needed_bytes=nbytes) as staging:
            by_name = {tensor.name: tensor for tensor in tensors}
            _write_shards(staging, shards, by_name, reader, dtypes, counter)
            if len(shards) > 1:
                write_synced(staging / INDEX_NAME, index_text(shards, nbytes).encode())
            files = hf_files.copy_hf_files(source, staging)
            main = Counter(dtypes.values()).most_common(1)[0][0]
            if dtype is not None:
                _set_config_dtype(staging / "config.json", main)
    logger.info("exported %s to %s", ckpt_dir, out_dir)
    return ExportReport(
        path=out_dir,
        family=spec.family,
        num_tensors=len(tensors),
        nbytes=nbytes,
        dtype=main,
        seconds=time.monotonic() - started,
        files=tuple(files),
        shards=len(shards),
    )


def check_hf_tensors(reader: SafetensorsReader, spec: ModelSpec) -> None:
    """Checks that a Hugging Face checkpoint holds exactly the model's tensors.

    Raises:
        CheckpointError: some are missing, left over, of another shape or not floating point.
    """
    needed = {tensor.name: tensor.shape for tensor in hf_tensors(spec)}
    found = reader.tensors
    missing = [name for name in needed if name not in found]
    leftover = [name for name in found if name not in needed and name not in ignored_hf_names(spec)]
    if spec.tie_word_embeddings and HF_HEAD in leftover:
        leftover.remove(HF_HEAD)
        _check_tied_head(reader, spec)
    if missing or leftover:
        raise CheckpointError(
            f"{reader.directory} does not hold the tensors its config.json describes ("
            f"{_named('missing', missing)}"
            f"{'; ' if missing and leftover else ''}{_named('left over', leftover)}): take config.json and"
            " weights from"
            " the same model"
        )
    for name, shape in needed.items():
        entry = found[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{reader.directory}: {name} has shape {list(entry.shape)} where config.json asks for"
                f" {list(shape)}: take"
                " config.json and weights from the same model"
            )
        if entry.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{reader.directory}: {name} is {hf_files.dtype_name(entry.dtype)}, a quantised checkpoint:"
                " take the"
                " bf16, fp16 or fp32 one"
            )


def check_megatron_tensors(reader: DistReader, spec: ModelSpec) -> None:
    """Checks that a distributed checkpoint holds exactly the model's tensors beside what training adds.

    Raises:
        CheckpointError: some are missing, left over or of another shape.
    """
    table = {MODULE_PREFIX + mapping.megatron: mapping for mapping in mappings_of(spec)}
    found = {
        key: tuple(value.size)
        for key, value in reader.tensors.items()
        if key.startswith(MODULE_PREFIX) and "_extra_state" not in key
    }
    missing = [key for key in table if key not in found]
    leftover = [key for key in found if key not in table]
    if missing or leftover:
        adapters = ", or merge its adapters first" if any("adapter" in key for key in leftover) else ""
        raise CheckpointError(
            f"{reader.weights_dir} does not hold the tensors config.json describes ("
            f"{_named('missing', missing)}"
            f"{'; ' if missing and leftover else ''}{_named('left over', leftover)}): use the config.json of"
            " the base the"
            f" run started from{adapters}"
        )
    for key, mapping in table.items():
        lead = (spec.num_layers,) if mapping.per_layer else ()
        wanted, shape = (*lead, *mapping.shape), found[key]
        padded = isinstance(mapping, Vocabulary) and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
        if shape != wanted and not padded:
            raise CheckpointError(
                f"{reader.weights_dir}: {key} has shape {list(shape)} where config.json asks for"
                f" {list(wanted)}: use the"
                " config.json of the base the run started from"
            )


def _named(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{what}: {shown}" if names else ""


def _check_tied_head(reader: SafetensorsReader, spec: ModelSpec) -> None:
    """Accepts a tied checkpoint's second copy of the embedding as its head only when it is bit for bit equal."""
    head, embedding = reader.tensors[HF_HEAD], reader.tensors.get(HF_EMBEDDING)
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None:
        row_bytes = spec.hidden_size * head.dtype.itemsize
        for start, stop in row_blocks(head.shape[0], row_bytes, BLOCK_BYTES):
            pair = [torch.empty((stop - start, *head.shape[1:]), dtype=head.dtype) for _ in range(2)]
            reader.read_rows(HF_HEAD, start, pair[0])
            reader.read_rows(HF_EMBEDDING, start, pair[1])
            same = same and byte_view(pair[0]) == byte_view(pair[1])
    if not same:
        raise CheckpointError(
            f"{reader.directory}: config.json ties the embeddings but {HF_HEAD} is not {HF_EMBEDDING}: set"
            " tie_word_embeddings to false, or remove that tensor"
        )


def _source_dtypes(
    reader: SafetensorsReader, spec: ModelSpec, wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Returns the dtype of every Megatron tensor's parts; they must agree unless a dtype is asked for."""
    dtypes: dict[str, torch.dtype] = {}
    for mapping in mappings_of(spec):
        found = Counter(
            reader.tensors[hf_name(template, layer)].dtype
            for template in mapping.hf_shapes()
            for layer in layers_of(mapping, spec)
        )
        if len(found) > 1 and wanted is None:
            kinds = ", ".join(sorted(hf_files.dtype_name(dtype) for dtype in found))
            raise CheckpointError(
                f"{reader.directory}: the parts of {mapping.megatron} are of several dtypes ({kinds}):"
                " choose one with"
                " --dtype"
            )
        dtypes[mapping.megatron] = found.most_common(1)[0][0]
    return dtypes


def _origin(spec: ModelSpec, dtypes: Mapping[str, torch.dtype], reader: SafetensorsReader) -> hf_files.Origin:
    numbers: Counter[torch.dtype] = Counter()
    for entry in reader.tensors.values():
        numbers[entry.dtype] += torch.Size(entry.shape).numel()
    main = numbers.most_common(1)[0][0]
    return hf_files.Origin(
        format_version=hf_files.FORMAT_VERSION,
        family=spec.family,
        vocab_size=spec.vocab_size,
        source_dtype=hf_files.dtype_name(main),
        source_dtype_exceptions={
            megatron: hf_files.dtype_name(dtype) for megatron, dtype in dtypes.items() if dtype != main
        },
    )


def _extra_state_keys(spec: ModelSpec) -> list[str]:
    per_layer = [
        f"{MODULE_PREFIX}{module}._extra_state/shard_{layer}_{spec.num_layers}"
        for module in EXTRA_STATE_PER_LAYER
        for layer in range(spec.num_layers)
    ]
    return per_layer + [f"{MODULE_PREFIX}{module}._extra_state/shard_0_1" for module in EXTRA_STATE]


def _producer(
    reader: SafetensorsReader,
    spec: ModelSpec,
    dtypes: Mapping[str, torch.dtype],
    counter: _Counter,
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


def _target_dtypes(
    ckpt_dir: Path,
    reader: DistReader,
    spec: ModelSpec,
    config: Mapping[str, object],
    dtype: str | torch.dtype | None,
) -> dict[str, torch.dtype]:
    """Returns what dtype to write: the one asked for, else the base model's, else the checkpoint's own."""
    names = [mapping.megatron for mapping in mappings_of(spec)]
    if dtype is not None:
        return dict.fromkeys(names, hf_files.parse_dtype(dtype))
    origin = hf_files.read_origin(ckpt_dir)
    if origin is not None:
        return {name: origin.dtype_of(name) for name in names}
    stated = config.get("dtype", config.get("torch_dtype"))
    if isinstance(stated, str):
        return dict.fromkeys(names, hf_files.parse_dtype(stated))
    return {name: reader.dtype(MODULE_PREFIX + name) for name in names}


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


def _write_shards(
    staging: Path,
    shards: Mapping[str, list[str]],
    tensors: Mapping[str, HfTensor],
    reader: DistReader,
    dtypes: Mapping[str, torch.dtype],
    counter: _Counter,
) -> None:
    """Writes every safetensors file, several at a time, each block by block."""

    def write(file_name: str, names: list[str]) -> None:
        described = {name: (dtypes[tensors[name].mapping.megatron], tensors[name].shape) for name in names}
        with (staging / file_name).open("wb") as stream:
            stream.write(header_bytes(described))
            for name in names:
                dtype, shape = described[name]
                row_bytes = tensors[name].mapping.row_numel * reader_itemsize(reader, tensors[name], dtype)
                for start, stop in row_blocks(shape[0], row_bytes, BLOCK_BYTES):
                    block = hf_block(reader, tensors[name], start, stop, dtype=dtype)
                    stream.write(byte_view(block))
                    counter.add(block.nbytes, name)
            stream.flush()
            os.fsync(stream.fileno())

    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        futures = [pool.submit(write, file_name, names) for file_name, names in shards.items()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def reader_itemsize(reader: DistReader, tensor: HfTensor, dtype: torch.dtype) -> int:
    """Returns the larger of the bytes per number read and written, so that a block bounds both."""
    return max(dtype.itemsize, reader.dtype(MODULE_PREFIX + tensor.mapping.megatron).itemsize)


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Writes another dtype into config.json; leaves the file untouched when it says so already."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != hf_files.dtype_name(dtype):
        config[key] = hf_files.dtype_name(dtype)
        write_synced(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _threads() -> int:
    return max(1, min(_THREADS, os.cpu_count() or 1))
