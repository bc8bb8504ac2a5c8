"""LoRA adapters in a torch distributed checkpoint: which tensors there are, whether a checkpoint holds exactly these, and their rows.

An adapted layer W [out, in] has A `linear_in.weight` [rank, in] and B `linear_out.weight` [out, rank], and computes
W x + alpha / rank * B (A x). Rows of B are in the order of the Megatron tensor's: query, key and value interleaved in
linear_qkv, gate before up projection in linear_fc1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asft_nemo.checkpoint.blocks import MODULE_PREFIX, hf_block
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import HfTensor, mappings_of
from asft_nemo.checkpoint.hf_files import CONTEXT, weights_directory
from asft_nemo.checkpoint.mapping import TensorMapping
from asft_nemo.checkpoint.safetensors_io import ClosesFiles
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec

#: in `context/` of a checkpoint that holds adapters only
ADAPTER_FILE = "adapter.json"

_PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
TARGETS = tuple(_PARENTS)


@dataclass(frozen=True)
class AdapterDescription:
    """What merging needs to know beside the tensors.

    Attributes:
        rank, alpha: the update of a weight is alpha / rank * B A.
        dropout: in training; nothing to merge.
        targets: the adapted linear layers.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank

    def to_json(self, *, base_sample: str | None = None) -> str:
        """The text of `context/adapter.json`; with `base_weights.base_sample` of the base, where it is known."""
        sample = {} if base_sample is None else {"base_sample": base_sample}
        return json.dumps({"format": 1, **asdict(self), **sample}, indent=2) + "\n"


def adapter_description(checkpoint: Path) -> AdapterDescription | None:
    """Returns what a checkpoint says of its adapters, None for one that holds a whole model.

    Raises:
        CheckpointError: the file is malformed.
    """
    file = checkpoint / CONTEXT / ADAPTER_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = AdapterDescription(
            int(values["rank"]), float(values["alpha"]), float(values["dropout"]), tuple(values["targets"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is malformed ({error!r}): copy the checkpoint again") from error
    unknown = [target for target in found.targets if target not in _PARENTS]
    if unknown or found.rank < 1:
        raise CheckpointError(
            f"{file} describes adapters of rank {found.rank} on {', '.join(found.targets)}, which this version cannot read: "
            "upgrade asft_nemo"
        )
    return found


def recorded_sample(checkpoint: Path) -> str | None:
    """Returns `base_weights.base_sample` of the base that a checkpoint's adapters were trained on, None where it is not recorded."""
    try:
        found: Any = json.loads((checkpoint / CONTEXT / ADAPTER_FILE).read_text(encoding="utf-8"))[
            "base_sample"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def weight_mapping(spec: ModelSpec, target: str) -> TensorMapping:
    """Returns the mapping of the weight that a target adapts."""
    name = f"decoder.layers.{_PARENTS[target]}.{target}.weight"
    return next(mapping for mapping in mappings_of(spec) if mapping.megatron == name)


def a_key(target: str) -> str:
    """Returns the name on disk of a target's A `[layers, rank, in]`."""
    return f"{MODULE_PREFIX}decoder.layers.{_PARENTS[target]}.{target}.adapter.linear_in.weight"


def b_mapping(spec: ModelSpec, target: str, rank: int) -> TensorMapping:
    """Returns how rows of a target's B `[out, rank]` lie: as those of the weight it adapts, `rank` numbers each."""
    name = f"decoder.layers.{_PARENTS[target]}.{target}.adapter.linear_out.weight"
    return replace(weight_mapping(spec, target), megatron=name, row_shape=(rank,))


def adapter_shapes(spec: ModelSpec, adapters: AdapterDescription) -> dict[str, tuple[int, ...]]:
    """Returns every adapter tensor on disk with its shape; the first dim counts the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in adapters.targets:
        above = b_mapping(spec, target, adapters.rank)
        (columns,) = weight_mapping(spec, target).row_shape
        shapes[a_key(target)] = (spec.num_layers, adapters.rank, columns)
        shapes[MODULE_PREFIX + above.megatron] = (spec.num_layers, *above.shape)
    return shapes


def check_adapter_tensors(reader: DistReader, spec: ModelSpec, adapters: AdapterDescription) -> None:
    """Checks that a checkpoint holds exactly these adapters of the model, and nothing of its base.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    wanted: Mapping[str, tuple[int, ...]] = adapter_shapes(spec, adapters)
    found = {
        key: tuple(value.size)
        for key, value in reader.tensors.items()
        if key.startswith(MODULE_PREFIX) and "_extra_state" not in key
    }
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{reader.weights_dir} does not hold this run's adapters: {key} is {_shape(found.get(key))} and should be "
            f"{_shape(wanted.get(key))}{more}; use the peft settings and the base that the checkpoint was trained with"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def draw_a(rank: int, columns: int, *, seed: int, layer: int, target: str) -> torch.Tensor:
    """Returns a fresh A `[rank, columns]` (xavier normal, fp32), the same at every layout.

    Args:
        rank, columns: its shape.
        seed: of the run.
        layer: index of the transformer layer, from 0.
        target: the adapted linear layer.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed_of(seed, layer + 1, target))
    return nn.init.xavier_normal_(
        torch.empty(rank, columns, dtype=torch.float32, device="cpu"), generator=generator
    )


def seed_of(*parts: Any) -> int:
    """A number below 2^48 that depends on every part."""
    text = " ".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class AdapterReader(ClosesFiles):
    """The adapters of one checkpoint, by layer and by rows under Hugging Face names. Thread safe."""

    def __init__(self, checkpoint: Path, spec: ModelSpec) -> None:
        """Reads the description and the metadata.

        Raises:
            CheckpointError: the checkpoint holds no adapters, or not the ones it describes.
        """
        weights = weights_directory(checkpoint)
        described = adapter_description(checkpoint)
        if described is None:
            raise CheckpointError(
                f"{checkpoint} holds a whole model, not adapters ({CONTEXT}/{ADAPTER_FILE} is missing): export it as one, without --adapters"
            )
        self.description = described
        self.mappings = {target: b_mapping(spec, target, described.rank) for target in described.targets}
        self._reader = DistReader(weights, summed=True)
        try:
            check_adapter_tensors(self._reader, spec, described)
        except CheckpointError:
            self._reader.close()
            raise

    def dtype(self, target: str) -> torch.dtype:
        """Returns the dtype of a target's A and B on disk."""
        return self._reader.dtype(a_key(target))

    def a(self, target: str, layer: int) -> torch.Tensor:
        """Returns one layer's A `[rank, in]`, which the parts of a fused layer share."""
        key = a_key(target)
        _, rank, columns = self._reader.tensors[key].size
        block = torch.empty((rank, columns), dtype=self._reader.dtype(key))
        self._reader.read_rows(key, layer, 0, block)
        return block

    def b_rows(self, target: str, template: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start:stop` of B `[rows, rank]`, in the row order of one Hugging Face weight of the target.

        Args:
            target: the adapted linear layer.
            template: the weight's name with `{layer}`.
            layer: index of the transformer layer.
            start, stop: its rows.
        """
        mapping = self.mappings[target]
        part = HfTensor(template, template, mapping.hf_shapes()[template], layer, mapping)
        return hf_block(
            self._reader, part, start, stop, dtype=self._reader.dtype(MODULE_PREFIX + mapping.megatron)
        )

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()
