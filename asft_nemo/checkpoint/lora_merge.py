"""Adapters merged into their base, as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.adapters import AdapterReader, recorded_sample
from asft_nemo.checkpoint.base_weights import (
    BaseWeights,
    base_sample,
    find_base,
    hf_only,
    open_base,
    own_files,
)
from asft_nemo.checkpoint.blocks import Progress
from asft_nemo.checkpoint.convert import MAX_SHARD_BYTES, ExportReport, write_hf_directory
from asft_nemo.checkpoint.families import HfTensor, hf_tensors
from asft_nemo.checkpoint.journal import files_identity
from asft_nemo.checkpoint.shards import OutRows, ProduceRows
from asft_nemo.errors import CheckpointError
from asft_nemo.model import read_model_spec

logger = logging.getLogger(__name__)


def export_merged(
    ckpt_dir: str | Path,
    out_dir: str | Path,
    *,
    base_dir: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes W + alpha / rank * B A for every adapted weight, and the base's other tensors bit for bit.

    The sum is made in fp32, whatever the dtypes of W, A and B, and then rounded once to the dtype written. The rest of the directory is
    as `export_hf` writes it. Memory: a few blocks of 64 MB per thread and one layer's A.

    Args:
        ckpt_dir: a checkpoint of a run with `peft=lora`.
        out_dir: directory to create; it appears complete or not at all. After a kill the same call goes on with the files that were
            complete.
        base_dir: the base, a Hugging Face directory (whose other files are then taken too) or a NeMo checkpoint; None looks for the one
            the run started from, see `find_base`.
        dtype: dtype to write; None takes the base's own, tensor by tensor.
        max_shard_bytes: upper bound of a safetensors file (one tensor may be larger).
        progress: called with (bytes done, bytes in all, tensor).

    Raises:
        CheckpointError: the checkpoint holds no adapters, its base is not there or another model, or the target cannot be written.
    """
    started = time.monotonic()
    ckpt_dir, out_dir = Path(ckpt_dir), Path(out_dir)
    wanted = None if dtype is None else hf_files.parse_dtype(dtype)
    spec = read_model_spec(own_files(ckpt_dir, base_dir))
    source = hf_files.hf_files_directory(ckpt_dir, hf_only(base_dir))
    with (
        AdapterReader(ckpt_dir, spec) as adapters,
        closing(open_base(find_base(ckpt_dir, base_dir), spec=spec)) as base,
    ):
        trained_on = recorded_sample(ckpt_dir)
        if trained_on is not None and trained_on != base_sample(base, spec):
            raise CheckpointError(
                f"{base.files[0].parent} does not hold the weights that the adapters of {ckpt_dir} were trained on: pass --base HF_DIR, the Hugging "
                "Face directory the run started from"
            )
        tensors = {tensor.name: tensor for tensor in hf_tensors(spec)}
        update = _updates(adapters)
        out = {
            name: OutRows(
                wanted or base.dtype(tensor), tensor.shape, max(base.itemsize(tensor), torch.float32.itemsize)
            )
            for name, tensor in tensors.items()
        }
        report = write_hf_directory(
            out_dir,
            spec,
            out,
            _merged_rows(base, tensors, out, update),
            source=source,
            inputs={
                "merge": files_identity(hf_files.weights_directory(ckpt_dir).iterdir()),
                "adapters": asdict(adapters.description),
                "base": files_identity(base.files),
            },
            states_dtype=wanted is not None,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    logger.info("merged the adapters of %s into %s", ckpt_dir, out_dir)
    return replace(report, seconds=time.monotonic() - started)


def _merged_rows(
    base: BaseWeights,
    tensors: dict[str, HfTensor],
    out: dict[str, OutRows],
    update: Callable[[HfTensor, int, int, torch.Tensor], torch.Tensor],
) -> ProduceRows:
    def produce(name: str, start: int, stop: int) -> torch.Tensor:
        tensor = tensors[name]
        return update(tensor, start, stop, base.rows(tensor, start, stop)).to(out[name].dtype)

    return produce


def _updates(adapters: AdapterReader) -> Callable[[HfTensor, int, int, torch.Tensor], torch.Tensor]:
    """Returns the function that adds rows `start:stop` of the update to those of a weight; other tensors stay what they are."""
    target_of = {
        template: target for target, mapping in adapters.mappings.items() for template in mapping.hf_shapes()
    }
    scale = adapters.description.scale

    def update(tensor: HfTensor, start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
        target = target_of.get(tensor.template)
        if target is None:
            return rows
        a = adapters.a(target, tensor.layer).float()
        b = adapters.b_rows(target, tensor.template, tensor.layer, start, stop).float()
        return rows.float().addmm_(b, a, alpha=scale)

    return update
