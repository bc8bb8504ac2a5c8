"""A PEFT directory as a checkpoint of adapters that any layout of the model can load, for continued training."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.adapters import (
    ADAPTER_FILE,
    AdapterDescription,
    a_key,
    adapter_shapes,
    b_mapping,
    draw_a,
)
from asft_nemo.checkpoint.blocks import BLOCK_BYTES, MODULE_PREFIX
from asft_nemo.checkpoint.mapping import Segment, hf_runs
from asft_nemo.checkpoint.peft_adapter import PeftAdapter
from asft_nemo.checkpoint.seal import write_seal
from asft_nemo.checkpoint.staging import staged_directory, write_synced
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec, read_model_spec

if TYPE_CHECKING:
    from asft_nemo.checkpoint.dist_write import Produce

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftImportReport:
    """What an import of a PEFT directory wrote.

    Attributes:
        path: the checkpoint directory.
        adapters: what it holds.
        nbytes: bytes of A and B.
        dtype: their dtype.
        exact: every number is the directory's own; False where B had to be scaled to another alpha / rank.
        seconds: wall clock.
    """

    path: Path
    adapters: AdapterDescription
    nbytes: int
    dtype: torch.dtype
    exact: bool
    seconds: float


def import_peft(
    peft_dir: str | Path,
    out_dir: str | Path,
    *,
    hf_dir: str | Path,
    adapters: AdapterDescription | None = None,
    seed: int = 0,
) -> PeftImportReport:
    """Writes the adapters of a PEFT directory in Megatron's form: the same function of every layer's input.

    Where query, key and value (or gate and up projection) have an A each, these are stacked, and the rank is the sum of theirs. What a
    run's adapters have beyond the directory's, more rank or more targets, starts as fresh adapters do: A drawn, B zero. Where the run's
    alpha / rank is another scale than PEFT's, B is multiplied with the quotient, in fp32 (exact where that is a power of two).

    Args:
        peft_dir: what `save_pretrained` of peft wrote, in safetensors.
        out_dir: directory to create; it appears complete or not at all.
        hf_dir: Hugging Face directory of the base: config.json, and the other files that go along.
        adapters: the run's adapters; None takes the smallest that hold the directory's, at its scale.
        seed: of the run; decides what is drawn.

    Raises:
        CheckpointError: the directory is not plain LoRA of this model in safetensors, the run's rank is too small or its targets are too
            few, or the target cannot be written.
    """
    # imports torch's planner, 1 s
    from asft_nemo.checkpoint.dist_write import OutTensor, write_dist_checkpoint

    started = time.monotonic()
    peft_dir, out_dir, hf_dir = Path(peft_dir), Path(out_dir), Path(hf_dir)
    spec = read_model_spec(hf_dir)
    with PeftAdapter(peft_dir, spec) as source:
        adapters = adapters or source.description()
        _check_room(source, adapters)
        parts = [part for found in source.parts.values() for part in found.values()]
        exact = all(math.isclose(part.scale, adapters.scale, rel_tol=1e-9) for part in parts)
        dtype = source.dtype() if exact else torch.float32
        if not exact:
            logger.warning(
                "B of %s is scaled: its alpha / rank is %g and the run's is %g; peft.alpha=%.12g would keep every number",
                peft_dir,
                source.description().scale,
                adapters.scale,
                source.description().scale * adapters.rank,
            )
        tensors = [
            OutTensor(key=key, dtype=dtype, layers=spec.num_layers, shape=shape[1:])
            for key, shape in adapter_shapes(spec, adapters).items()
        ]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        with staged_directory(out_dir, needed_bytes=nbytes) as staging:
            write_dist_checkpoint(
                staging / hf_files.WEIGHTS,
                tensors,
                objects=[],
                produce=_blocks(source, spec, adapters, dtype, seed, exact=exact),
                block_bytes=BLOCK_BYTES,
                threads=1,
            )
            context = staging / hf_files.CONTEXT
            hf_files.copy_hf_files(hf_dir, context / hf_files.HF_FILES)
            write_synced(context / ADAPTER_FILE, adapters.to_json().encode())
            write_seal(staging)
    logger.info("imported the adapters of %s to %s (rank %d)", peft_dir, out_dir, adapters.rank)
    return PeftImportReport(out_dir, adapters, nbytes, dtype, exact, time.monotonic() - started)


def check_peft(peft_dir: str | Path, *, hf_dir: str | Path, adapters: AdapterDescription) -> None:
    """Checks that `import_peft` can write these adapters; arguments and errors are its own."""
    with PeftAdapter(Path(peft_dir), read_model_spec(Path(hf_dir))) as source:
        _check_room(source, adapters)


def _check_room(source: PeftAdapter, adapters: AdapterDescription) -> None:
    """Checks that the run's adapters can hold the directory's."""
    needed = source.description()
    left_out = [target for target in needed.targets if target not in adapters.targets]
    if left_out:
        raise CheckpointError(
            f"{source.directory} adapts {', '.join(left_out)}, which peft.targets leaves out: set peft.targets=["
            f"{', '.join((*adapters.targets, *left_out))}]"
        )
    if adapters.rank < needed.rank:
        why = " (its projections have an A each, and a fused layer holds them all)" if source.stacked else ""
        raise CheckpointError(
            f"{source.directory} needs rank {needed.rank}{why}, got peft.rank={adapters.rank}: set peft.rank={needed.rank} "
            f"peft.alpha={needed.alpha:.12g}"
        )


def _blocks(
    source: PeftAdapter,
    spec: ModelSpec,
    adapters: AdapterDescription,
    dtype: torch.dtype,
    seed: int,
    *,
    exact: bool,
) -> Produce:
    """Returns the function that assembles rows of Megatron's A or B."""
    shapes = adapter_shapes(spec, adapters)
    target_of: dict[str, str] = {}
    segments: dict[str, tuple[Segment, ...]] = {}
    for target in adapters.targets:
        mapping = b_mapping(spec, target, adapters.rank)
        target_of |= {a_key(target): target, MODULE_PREFIX + mapping.megatron: target}
        segments[target] = mapping.segments()

    def a_rows(target: str, layer: int) -> torch.Tensor:
        columns = shapes[a_key(target)][2]
        block = draw_a(adapters.rank, columns, seed=seed, layer=layer, target=target).to(dtype)
        for part in source.parts.get((target, layer), {}).values():
            block[part.column : part.column + part.rank] = source.read(part.a, 0, part.rank)
        return block

    def b_rows(target: str, layer: int, start: int, stop: int) -> torch.Tensor:
        block = torch.zeros((stop - start, adapters.rank), dtype=dtype)
        parts = source.parts.get((target, layer), {})
        for run in hf_runs(segments[target], start, stop):
            part = parts.get(run.name)
            if part is None:
                continue
            rows = source.read(part.b, run.start, run.start + run.rows)
            if not exact:
                rows = rows.float() * (part.scale / adapters.scale)
            block[run.into : run.into + run.rows, part.column : part.column + part.rank] = rows
        return block

    def produce(key: str, layer: int, start: int, stop: int) -> torch.Tensor:
        target = target_of[key]
        if key == a_key(target):
            return a_rows(target, layer)[start:stop].clone()
        return b_rows(target, layer, start, stop)

    return produce
