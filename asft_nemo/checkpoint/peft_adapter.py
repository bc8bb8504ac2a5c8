"""A PEFT directory matched against a model: which Megatron layer each of its adapters belongs to, and at which columns.

linear_qkv has one A where PEFT has three. Where the three are the same numbers, Megatron's A is that one. Where they differ it is their
rows one below another, and B holds each part's columns where its A went and zeros elsewhere: the same function, at the sum of the ranks.
linear_fc1 likewise, of gate and up projection. A part that has no adapter has rows of zeros in B.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from asft_nemo.checkpoint.adapters import TARGETS, AdapterDescription, weight_mapping
from asft_nemo.checkpoint.families import hf_name
from asft_nemo.checkpoint.peft_config import PeftDescription, named_by, read_peft_config
from asft_nemo.checkpoint.safetensors_io import ClosesFiles, TensorEntry, read_header, read_into
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec

PEFT_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """The adapter of one Hugging Face linear layer inside a Megatron layer.

    Attributes:
        a, b: where its A `[rank, in]` and B `[out, rank]` lie.
        column: first row of Megatron's A, and first column of its B, that are this part's; parts with the same A share them.
        scale: what PEFT multiplies B A with.
    """

    a: TensorEntry
    b: TensorEntry
    column: int
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


class PeftAdapter(ClosesFiles):
    """An open PEFT directory. Thread safe.

    Attributes:
        directory: where it is.
        config: its description.
        parts: (target, layer) -> Hugging Face weight (a name with `{layer}`) -> its part; only what is adapted.
        rank: what an adapter needs to hold every layer's parts.
        stacked: some layer needs more than the rank of its parts, because their A differ.
    """

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        """Reads the description, the header, and the A's of fused layers.

        Raises:
            CheckpointError: not plain LoRA, not in safetensors, incomplete, or not of this model.
        """
        self.directory, self.config = directory, read_peft_config(directory)
        self.path = directory / PEFT_WEIGHTS
        if not self.path.is_file():
            found = [
                name for name in ("adapter_model.bin", "adapter_model.pt") if (directory / name).exists()
            ]
            hint = f" ({found[0]} can run code when it is read)" if found else ""
            raise CheckpointError(
                f"{directory} holds no {PEFT_WEIGHTS}{hint}: save the adapter with save_pretrained(..., safe_serialization=True)"
            )
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            sides = _sides(self.path)
            _check_modules(self.path, sides, spec, self.config)
            self.parts = {
                (target, layer): found
                for target in TARGETS
                for layer in range(spec.num_layers)
                if (found := self._parts(sides, spec, target, layer))
            }
        except BaseException:
            self.close()
            raise
        widths = {
            at: max(part.column + part.rank for part in parts.values()) for at, parts in self.parts.items()
        }
        self.rank = max(widths.values())
        self.stacked = any(
            width > max(p.rank for p in self.parts[at].values()) for at, width in widths.items()
        )

    def description(self) -> AdapterDescription:
        """Returns the smallest adapters that hold these, at the scale most of them have."""
        scales = Counter(part.scale for parts in self.parts.values() for part in parts.values())
        return AdapterDescription(
            rank=self.rank,
            alpha=float(f"{scales.most_common(1)[0][0] * self.rank:.12g}"),  # 16 / 3 * 3 is 16
            dropout=self.config.dropout,
            targets=tuple(target for target in TARGETS if any(at[0] == target for at in self.parts)),
        )

    def dtype(self) -> torch.dtype:
        """Returns the narrowest dtype that holds all of its tensors."""
        dtypes = {
            entry.dtype
            for parts in self.parts.values()
            for part in parts.values()
            for entry in (part.a, part.b)
        }
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start:stop` of a tensor in the dtype it is stored in."""
        rows = torch.empty((stop - start, entry.shape[1]), dtype=entry.dtype)
        offset = entry.offset + start * entry.shape[1] * entry.dtype.itemsize
        read_into(self._descriptor, offset, rows, path=self.path)
        return rows

    def _parts(
        self, sides: dict[str, dict[str, TensorEntry]], spec: ModelSpec, target: str, layer: int
    ) -> dict[str, Part]:
        """Finds the parts of one Megatron layer, and places each A below those that are not the same numbers."""
        parts: dict[str, Part] = {}
        placed: list[tuple[torch.Tensor, int]] = []
        free = 0
        for template in weight_mapping(spec, target).hf_shapes():
            module = hf_name(template, layer).removesuffix(".weight")
            if module not in sides:
                continue
            a, b = sides[module]["A"], sides[module]["B"]
            values = self.read(a, 0, a.shape[0])
            column = next((at for other, at in placed if _same(other, values)), None)
            if column is None:
                column, free = free, free + a.shape[0]
                placed.append((values, column))
            parts[template] = Part(a, b, column, self.config.scale(module, a.shape[0]))
        return parts

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _sides(path: Path) -> dict[str, dict[str, TensorEntry]]:
    """Returns module -> A and B."""
    sides: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_header(path).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path} holds {name}, which is no adapter of a linear layer: merge the adapter into its base and start from that"
            )
        sides.setdefault(match["module"], {})[match["side"]] = entry
    if not sides:
        raise CheckpointError(f"{path} holds no adapters: copy the adapter again")
    return sides


def _check_modules(
    path: Path, sides: dict[str, dict[str, TensorEntry]], spec: ModelSpec, config: PeftDescription
) -> None:
    """Checks that the file holds A and B, in the model's shapes, of the model's linear layers that the description names."""
    shapes: dict[str, tuple[int, ...]] = {
        hf_name(template, layer).removesuffix(".weight"): shape
        for target in TARGETS
        for template, shape in weight_mapping(spec, target).hf_shapes().items()
        for layer in range(spec.num_layers)
    }
    for module, found in sides.items():
        if module not in shapes:
            known = sorted({name.rpartition(".")[2] for name in shapes})
            raise CheckpointError(
                f"{path} adapts {module}, which is none of this model's layers that can be adapted ({', '.join(known)}): take the base the "
                "adapter was trained on, or merge the adapter into it and start from that"
            )
        _check_shapes(path, module, found, shapes[module], None if config.own_ranks else config.rank)
    if config.targets is not None:
        named = {module for module in shapes if any(named_by(module, key) for key in config.targets)}
        if named != set(sides):
            raise CheckpointError(
                f"{path} does not hold the adapters that target_modules names (first difference: {min(named ^ set(sides))}): copy the "
                "adapter again"
            )


def _check_shapes(
    path: Path, module: str, found: dict[str, TensorEntry], weight: tuple[int, ...], rank: int | None
) -> None:
    if set(found) != {"A", "B"}:
        raise CheckpointError(f"{path} holds only lora_{min(found)} of {module}: copy the adapter again")
    a, b = found["A"], found["B"]
    wanted = a.shape[0] if rank is None and a.shape else rank
    if a.shape != (wanted, weight[1]) or b.shape != (weight[0], wanted) or not wanted:
        raise CheckpointError(
            f"{path}: the adapter of {module} has shapes {list(a.shape)} and {list(b.shape)} where rank {wanted} on a weight of "
            f"{list(weight)} asks for {[wanted, weight[1]]} and {[weight[0], wanted]}: take the base the adapter was trained on"
        )
    for entry in (a, b):
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: the adapter of {module} is of {entry.dtype}: save it in fp32, bf16 or fp16"
            )
