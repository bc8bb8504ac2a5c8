"""Whether a NeMo checkpoint and a Hugging Face checkpoint hold the same numbers, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.blocks import BLOCK_BYTES, Progress, hf_block, widest_itemsize
from asft_nemo.checkpoint.checks import check_hf_tensors, check_megatron_tensors
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import HfTensor, hf_tensors
from asft_nemo.checkpoint.mapping import row_blocks
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader
from asft_nemo.model import read_model_spec


@dataclass(frozen=True)
class TensorDifference:
    """One Hugging Face tensor whose numbers differ.

    Attributes:
        name: the tensor.
        numbers: how many of its numbers differ in their bits.
        total: how many numbers it has.
        max_difference: largest absolute difference (nan where a nan is involved).
    """

    name: str
    numbers: int
    total: int
    max_difference: float


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a comparison.

    Attributes:
        num_tensors: Hugging Face tensors compared.
        nbytes: their bytes.
        differences: the tensors that differ; empty when the checkpoints are identical.
    """

    num_tensors: int
    nbytes: int
    differences: tuple[TensorDifference, ...]

    @property
    def identical(self) -> bool:
        """Whether every bit agrees."""
        return not self.differences


def verify(ckpt_dir: str | Path, hf_dir: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Compares every tensor of a Hugging Face checkpoint with what the NeMo checkpoint says it should be.

    The NeMo checkpoint's numbers are cast to the Hugging Face tensor's dtype first, as an export would.
    Memory: a few blocks of 64 MB.

    Args:
        ckpt_dir: directory with `weights/`.
        hf_dir: directory with config.json and safetensors.
        progress: called with (bytes done, bytes in all, tensor).

    Raises:
        CheckpointError: one of the two is incomplete, or they are of different shapes.
    """
    spec = read_model_spec(hf_dir)
    with (
        SafetensorsReader(hf_dir) as hf,
        DistReader(hf_files.weights_directory(Path(ckpt_dir)), summed=True) as reader,
    ):
        check_hf_tensors(hf, spec)
        check_megatron_tensors(reader, spec)
        tensors = hf_tensors(spec)
        total = sum(hf.tensors[tensor.name].nbytes for tensor in tensors)
        differences: list[TensorDifference] = []
        done = 0
        for tensor in tensors:
            difference = _compare(hf, reader, tensor)
            if difference is not None:
                differences.append(difference)
            done += hf.tensors[tensor.name].nbytes
            if progress is not None:
                progress(done, total, tensor.name)
    return VerifyReport(num_tensors=len(tensors), nbytes=total, differences=tuple(differences))


def _compare(hf: SafetensorsReader, reader: DistReader, tensor: HfTensor) -> TensorDifference | None:
    entry = hf.tensors[tensor.name]
    row_bytes = tensor.mapping.row_numel * widest_itemsize(reader, tensor, entry.dtype)
    numbers, largest = 0, 0.0
    for start, stop in row_blocks(tensor.shape[0], row_bytes, BLOCK_BYTES):
        ours = hf_block(reader, tensor, start, stop, dtype=entry.dtype)
        theirs = torch.empty_like(ours)
        hf.read_rows(tensor.name, start, theirs)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[entry.dtype.itemsize]
        if torch.equal(ours.view(bits), theirs.view(bits)):
            continue
        different = ours.view(bits) != theirs.view(bits)
        numbers += int(different.sum())
        gap = (ours[different].double() - theirs[different].double()).abs().max().item()
        largest = gap if gap != gap or gap > largest else largest
    if numbers == 0:
        return None
    return TensorDifference(
        name=tensor.name, numbers=numbers, total=torch.Size(entry.shape).numel(), max_difference=largest
    )
