"""Hugging Face checkpoints in and out of torch distributed checkpoints, with no model in memory."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.blocks import (
    BLOCK_BYTES,
    COMPLETE_BEFORE,
    MODULE_PREFIX,
    Progress,
    ProgressCounter,
    hf_block,
    megatron_blocks,
    threads,
)
from asft_nemo.checkpoint.checks import (
    check_hf_tensors,
    check_megatron_tensors,
    check_not_quantised,
    source_dtypes,
)
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import (
    EXTRA_STATE,
    EXTRA_STATE_PER_LAYER,
    HfTensor,
    hf_tensors,
    mappings_of,
)
from asft_nemo.checkpoint.journal import files_identity
from asft_nemo.checkpoint.safetensors_io import (
    INDEX_NAME,
    SafetensorsReader,
    index_text,
    plan_shards,
)
from asft_nemo.checkpoint.seal import write_seal
from asft_nemo.checkpoint.shards import OutRows, ProduceRows, write_shards
from asft_nemo.checkpoint.staging import resumable_directory, write_synced
from asft_nemo.config.run_folder import model_source
from asft_nemo.model import ModelSpec, model_spec, read_hf_config

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000


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
class ExportReport(ImportReport):
    """What an export wrote; `shards` counts the safetensors files."""

    shards: int


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
    weight, unchanged) and `context/asft.json`. It appears complete or not at all; after a kill
    the same call goes on with the files that were complete. Memory: a few blocks of 64
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
    from asft_nemo.checkpoint.dist_write import (
        OutTensor,
        write_dist_checkpoint,
    )  # imports torch's planner, 1 s

    started = time.monotonic()
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    config = read_hf_config(hf_dir)
    check_not_quantised(hf_dir, config)
    spec = model_spec(config)
    wanted = None if dtype is None else hf_files.parse_dtype(dtype)
    with SafetensorsReader(hf_dir) as reader:
        check_hf_tensors(reader, spec)
        dtypes = source_dtypes(reader, spec, wanted)
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
        counter = ProgressCounter(progress, nbytes)
        origin = _origin(spec, dtypes, reader, model_source(hf_dir))
        job = {
            **conversion_identity(spec),
            "import": files_identity({entry.path for entry in reader.tensors.values()}),
            "tensors": [
                [tensor.key, hf_files.dtype_name(tensor.dtype), *tensor.global_shape] for tensor in tensors
            ],
            "block_bytes": BLOCK_BYTES,
        }
        with resumable_directory(out_dir, needed_bytes=nbytes, job=job) as (staging, journal):
            write_dist_checkpoint(
                staging / hf_files.WEIGHTS,
                tensors,
                objects=_extra_state_keys(spec),
                produce=megatron_blocks(
                    reader, spec, {tensor.key: tensor.dtype for tensor in tensors}, counter
                ),
                block_bytes=BLOCK_BYTES,
                threads=threads(),
                journal=journal,
                skipped=lambda done: counter.add(done, COMPLETE_BEFORE),
            )
            context = staging / hf_files.CONTEXT
            files = hf_files.copy_hf_files(hf_dir, context / hf_files.HF_FILES)
            hf_files.write_origin(context, origin)
            write_seal(staging)
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
    with DistReader(weights, summed=True) as reader:
        check_megatron_tensors(reader, spec)
        dtypes = _target_dtypes(ckpt_dir, reader, spec, config, dtype)
        tensors = {tensor.name: tensor for tensor in hf_tensors(spec)}
        out = {
            name: OutRows(
                dtypes[tensor.mapping.megatron],
                tensor.shape,
                reader.dtype(MODULE_PREFIX + tensor.mapping.megatron).itemsize,
            )
            for name, tensor in tensors.items()
        }
        report = write_hf_directory(
            out_dir,
            spec,
            out,
            _converted_rows(reader, tensors, out),
            source=source,
            inputs={"export": files_identity(weights.iterdir())},
            states_dtype=dtype is not None,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    logger.info("exported %s to %s", ckpt_dir, out_dir)
    return replace(report, seconds=time.monotonic() - started)


def write_hf_directory(
    out_dir: Path,
    spec: ModelSpec,
    out: Mapping[str, OutRows],
    produce: ProduceRows,
    *,
    source: Path,
    inputs: Mapping[str, object],
    states_dtype: bool,
    max_shard_bytes: int,
    progress: Progress | None,
) -> ExportReport:
    """Writes a Hugging Face checkpoint from whatever makes its rows; a killed start is gone on with.

    Args:
        out_dir: directory to create.
        spec: the model.
        out: every tensor, in order.
        produce: makes rows of one.
        source: where the files that are no weights come from.
        inputs: what else decides the content, as plain values.
        states_dtype: config.json names the dtype that most tensors get.
        max_shard_bytes, progress: see `export_hf`.
    """
    started = time.monotonic()
    sizes = {name: rows.nbytes for name, rows in out.items()}
    nbytes = sum(sizes.values())
    shards = plan_shards(sizes, max_shard_bytes)
    main = Counter(rows.dtype for rows in out.values()).most_common(1)[0][0]
    job = {
        **conversion_identity(spec),
        **inputs,
        "shards": shards,
        "dtypes": {name: hf_files.dtype_name(rows.dtype) for name, rows in out.items()},
    }
    with resumable_directory(out_dir, needed_bytes=nbytes, job=job) as (staging, journal):
        write_shards(staging, shards, out, produce, ProgressCounter(progress, nbytes), journal)
        if len(shards) > 1:
            write_synced(staging / INDEX_NAME, index_text(shards, nbytes).encode())
        files = hf_files.copy_hf_files(source, staging)
        if states_dtype:
            _set_config_dtype(staging / "config.json", main)
    return ExportReport(
        path=out_dir,
        family=spec.family,
        num_tensors=len(out),
        nbytes=nbytes,
        dtype=main,
        seconds=time.monotonic() - started,
        files=tuple(files),
        shards=len(shards),
    )


def conversion_identity(spec: ModelSpec) -> dict[str, object]:
    """What decides how rows are rearranged: the architecture, and the version of the mapping and of the files' form."""
    return {"spec": asdict(spec), "version": hf_files.FORMAT_VERSION}


def _origin(
    spec: ModelSpec,
    dtypes: Mapping[str, torch.dtype],
    reader: SafetensorsReader,
    source: dict[str, Any],
) -> hf_files.Origin:
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
        source=source,
    )


def _extra_state_keys(spec: ModelSpec) -> list[str]:
    per_layer = [
        f"{MODULE_PREFIX}{module}._extra_state/shard_{layer}_{spec.num_layers}"
        for module in EXTRA_STATE_PER_LAYER
        for layer in range(spec.num_layers)
    ]
    return per_layer + [f"{MODULE_PREFIX}{module}._extra_state/shard_0_1" for module in EXTRA_STATE]


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


def _converted_rows(
    reader: DistReader, tensors: Mapping[str, HfTensor], out: Mapping[str, OutRows]
) -> ProduceRows:
    def produce(name: str, start: int, stop: int) -> torch.Tensor:
        return hf_block(reader, tensors[name], start, stop, dtype=out[name].dtype)

    return produce


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Writes another dtype into config.json; leaves the file untouched when it says so already."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != hf_files.dtype_name(dtype):
        config[key] = hf_files.dtype_name(dtype)
        write_synced(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
