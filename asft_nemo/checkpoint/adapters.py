"""LoRA adapters in a torch distributed checkpoint: which tensors there are, and whether a checkpoint holds exactly these.

An adapted layer W [out, in] has A `linear_in.weight` [rank, in] and B `linear_out.weight` [out, rank], and computes
W x + alpha / rank * B (A x). Rows of B are in the order of the Megatron tensor's: query, key and value interleaved in
linear_qkv, gate before up projection in linear_fc1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from asft_nemo.checkpoint.blocks import MODULE_PREFIX
from asft_nemo.checkpoint.dist_read import DistReader
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

    def to_json(self) -> str:
        """The text of `context/adapter.json`."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n"


def adapter_description(checkpoint: Path) -> AdapterDescription | None:
    """Returns what a checkpoint says of its adapters, None for one that holds a whole model."""
    file = checkpoint / "context" / ADAPTER_FILE
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    return AdapterDescription(values["rank"], values["alpha"], values["dropout"], tuple(values["targets"]))


def adapter_shapes(spec: ModelSpec, adapters: AdapterDescription) -> dict[str, tuple[int, ...]]:
    """Returns every adapter tensor on disk with its shape; the first dim counts the layers."""
    sizes = {
        "linear_qkv": (spec.query_rows + 2 * spec.key_value_rows, spec.hidden_size),
        "linear_proj": (spec.hidden_size, spec.query_rows),
        "linear_fc1": (2 * spec.ffn_hidden_size, spec.hidden_size),
        "linear_fc2": (spec.hidden_size, spec.ffn_hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for target in adapters.targets:
        rows, columns = sizes[target]
        name = f"{MODULE_PREFIX}decoder.layers.{_PARENTS[target]}.{target}.adapter"
        shapes[f"{name}.linear_in.weight"] = (spec.num_layers, adapters.rank, columns)
        shapes[f"{name}.linear_out.weight"] = (spec.num_layers, rows, adapters.rank)
    return shapes


def check_adapter_tensors(reader: DistReader, spec: ModelSpec, adapters: AdapterDescription) -> None:
    """Checks that a checkpoint holds exactly these adapters of the model, and nothing of its base.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    wanted: Mapping[str, tuple[int, ...]] = adapter_shapes(spec, adapters)
    found = {key: tuple(value.size) for key, value in reader.tensors.items() if key.startswith(MODULE_PREFIX)}
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
