"""Whether a checkpoint holds exactly the tensors that its config.json describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from asft_nemo.checkpoint.blocks import BLOCK_BYTES, MODULE_PREFIX
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import (
    HF_EMBEDDING,
    HF_HEAD,
    hf_name,
    hf_tensors,
    ignored_hf_names,
    layers_of,
    mappings_of,
)
from asft_nemo.checkpoint.hf_files import dtype_name
from asft_nemo.checkpoint.mapping import Vocabulary, row_blocks
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec


def check_not_quantised(directory: Path, config: Mapping[str, object]) -> None:
    """Checks that config.json asks nobody to quantise: it would go along into every export, and trained weights would be served in 4 bits.

    Raises:
        CheckpointError: it does. Merging adapters into a base that was loaded quantised leaves such a field beside plain weights.
    """
    field = next((name for name in ("quantization_config", "compression_config") if config.get(name)), None)
    if field is not None:
        raise CheckpointError(
            f"{directory}/config.json has a {field}, by which whoever loads an export of this model would quantise it: take the bf16, fp16 or fp32 "
            "model, or where these weights are such remove that field"
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
        if entry.dtype == torch.float64:
            raise CheckpointError(
                f"{reader.directory}: {name} is float64, which no checkpoint is written in: save the model in fp32 first"
            )
        if entry.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{reader.directory}: {name} is {dtype_name(entry.dtype)}, a quantised checkpoint:"
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
        adapters = (
            ", or for a LoRA checkpoint choose --adapters merge or --adapters peft"
            if any("adapter" in key for key in leftover)
            else ""
        )
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


def source_dtypes(
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
            kinds = ", ".join(sorted(dtype_name(dtype) for dtype in found))
            raise CheckpointError(
                f"{reader.directory}: the parts of {mapping.megatron} are of several dtypes ({kinds}):"
                " choose one with"
                " --dtype"
            )
        dtypes[mapping.megatron] = found.most_common(1)[0][0]
    return dtypes


def _check_tied_head(reader: SafetensorsReader, spec: ModelSpec) -> None:
    """Accepts the second copy of the embedding in a tied checkpoint only when it is equal bit for bit."""
    head, embedding = reader.tensors[HF_HEAD], reader.tensors.get(HF_EMBEDDING)
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None:
        row_bytes = spec.hidden_size * head.dtype.itemsize
        for start, stop in row_blocks(head.shape[0], row_bytes, BLOCK_BYTES):
            pair = [torch.empty((stop - start, *head.shape[1:]), dtype=head.dtype) for _ in range(2)]
            reader.read_rows(HF_HEAD, start, pair[0])
            reader.read_rows(HF_EMBEDDING, start, pair[1])
            same = same and torch.equal(*(block.view(torch.uint8) for block in pair))
    if not same:
        raise CheckpointError(
            f"{reader.directory}: config.json ties the embeddings but {HF_HEAD} is not {HF_EMBEDDING}: set"
            " tie_word_embeddings to false, or remove that tensor"
        )


def _named(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{what}: {shown}" if names else ""
