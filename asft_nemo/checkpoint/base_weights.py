"""The weights that a run with adapters left untouched: where they are, and their rows."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.blocks import MODULE_PREFIX, hf_block
from asft_nemo.checkpoint.checks import check_hf_tensors, check_megatron_tensors
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.families import HfTensor, hf_tensors
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader, byte_view
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec, model_spec, read_hf_config, read_model_spec

# Two bases may differ in these and still be the same function of their weights.
_NOT_THE_FUNCTION = ("max_position_embeddings", "attention_dropout", "initializer_range", "architecture")


class BaseWeights(Protocol):
    """Rows of a base model under Hugging Face names. Thread safe.

    Attributes:
        files: what they are read from.
    """

    files: tuple[Path, ...]

    def dtype(self, tensor: HfTensor) -> torch.dtype:
        """Returns the dtype a tensor has in the Hugging Face checkpoint."""
        ...

    def itemsize(self, tensor: HfTensor) -> int:
        """Returns the bytes of a number where it is read from."""
        ...

    def rows(self, tensor: HfTensor, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start:stop` in memory of their own, in the dtype they are stored in."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class HfBase:
    """A base in a Hugging Face directory."""

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        """Reads the headers; raises `CheckpointError` when they are not those of the model."""
        self._reader = SafetensorsReader(directory)
        check_hf_tensors(self._reader, spec)
        self.files = tuple({entry.path for entry in self._reader.tensors.values()})

    def dtype(self, tensor: HfTensor) -> torch.dtype:
        """Returns the dtype of a tensor."""
        return self._reader.tensors[tensor.name].dtype

    def itemsize(self, tensor: HfTensor) -> int:
        """Returns the bytes of a number."""
        return self.dtype(tensor).itemsize

    def rows(self, tensor: HfTensor, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start:stop`."""
        block = torch.empty((stop - start, *tensor.shape[1:]), dtype=self.dtype(tensor))
        self._reader.read_rows(tensor.name, start, block)
        return block

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()


class DistBase:
    """A base in NeMo form: what a run imported, or trained from."""

    def __init__(self, checkpoint: Path, spec: ModelSpec, config: dict[str, Any], *, summed: bool) -> None:
        """Reads the metadata (`summed`: see `DistReader`); raises `CheckpointError` when it is not that of the model."""
        weights = hf_files.weights_directory(checkpoint)
        self.files = tuple(weights.iterdir())
        self._reader = DistReader(weights, summed=summed)
        check_megatron_tensors(self._reader, spec)
        self._origin = hf_files.read_origin(checkpoint)
        stated = config.get("dtype", config.get("torch_dtype"))
        self._stated = hf_files.parse_dtype(stated) if isinstance(stated, str) else None

    def dtype(self, tensor: HfTensor) -> torch.dtype:
        """Returns the dtype a tensor had before it was imported, where that is known."""
        if self._origin is not None:
            return self._origin.dtype_of(tensor.mapping.megatron)
        return self._stated or self._reader.dtype(MODULE_PREFIX + tensor.mapping.megatron)

    def itemsize(self, tensor: HfTensor) -> int:
        """Returns the bytes of a number on disk."""
        return self._reader.dtype(MODULE_PREFIX + tensor.mapping.megatron).itemsize

    def rows(self, tensor: HfTensor, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start:stop`."""
        stored = self._reader.dtype(MODULE_PREFIX + tensor.mapping.megatron)
        return hf_block(self._reader, tensor, start, stop, dtype=stored)

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()


def open_base(directory: Path, *, spec: ModelSpec, summed: bool = True) -> BaseWeights:
    """Opens a base in either form.

    Args:
        directory: Hugging Face directory or NeMo checkpoint.
        spec: the model the adapters were trained on.
        summed: of a NeMo checkpoint, hold whole chunks against their checksums before a row is read.

    Raises:
        CheckpointError: it is incomplete, or another model.
    """
    nemo = is_nemo(directory)
    config = read_hf_config(hf_files.hf_files_directory(directory, None) if nemo else directory)
    found = model_spec(config)
    mine, theirs = asdict(spec), asdict(found)
    other = [key for key in mine if mine[key] != theirs[key] and key not in _NOT_THE_FUNCTION]
    if other:
        key = other[0]
        raise CheckpointError(
            f"{directory} is not the base of these adapters ({key} is {theirs[key]}, the run's was {mine[key]}): pass --base HF_DIR, the "
            "Hugging Face directory the run started from"
        )
    return DistBase(directory, spec, config, summed=summed) if nemo else HfBase(directory, spec)


def base_sample(base: BaseWeights, spec: ModelSpec) -> str:
    """Returns a SHA-256 (hex) over the first and the middle row of every tensor, rounded to bf16.

    Rounded, a base has the same sample as a Hugging Face directory and as its import in bf16 or fp32.
    """
    digest = hashlib.sha256()
    for tensor in hf_tensors(spec):
        digest.update(tensor.name.encode())
        for row in (0, tensor.shape[0] // 2):
            digest.update(byte_view(base.rows(tensor, row, row + 1).to(torch.bfloat16)))
    return digest.hexdigest()


def nemo_base_sample(checkpoint: Path) -> str:
    """Returns `base_sample` of a base in NeMo form; raises as `open_base`.

    It reads the sampled rows alone. All ranks wait for it at every checkpoint of adapters; whole chunks would be a third of a large base,
    which was held against its checksums when it was loaded.
    """
    spec = read_model_spec(hf_files.hf_files_directory(checkpoint, None))
    with closing(open_base(checkpoint, spec=spec, summed=False)) as base:
        return base_sample(base, spec)


def own_files(checkpoint: Path, base_dir: str | Path | None) -> Path:
    """Returns where to read which model a checkpoint's adapters are of: its own `context/hf`, else a Hugging Face directory given.

    Raises:
        CheckpointError: neither is there, or it is no checkpoint.
    """
    hf_files.weights_directory(checkpoint)
    own = checkpoint / hf_files.CONTEXT / hf_files.HF_FILES
    return (
        own if (own / "config.json").is_file() else hf_files.hf_files_directory(checkpoint, hf_only(base_dir))
    )


def hf_only(base_dir: str | Path | None) -> Path | None:
    """Returns a base that was given if it is a Hugging Face directory, from which other files than weights can be taken."""
    return None if base_dir is None or is_nemo(Path(base_dir)) else Path(base_dir)


def is_nemo(directory: Path) -> bool:
    """Whether a directory is a NeMo checkpoint rather than a Hugging Face one."""
    return (directory / hf_files.WEIGHTS).is_dir()


def find_base(checkpoint: Path, base_dir: str | Path | None) -> Path:
    """Returns where the base of a checkpoint of adapters is.

    That is the directory given; else `base/` of the run the checkpoint lies in, where the run imported its base; else what
    `context/run.json` recorded. One that was not given must have the config.json that the checkpoint has, byte for byte.

    Raises:
        CheckpointError: none of them is there.
    """
    if base_dir is not None:
        return Path(base_dir)
    named = recorded_base(checkpoint)
    places = [checkpoint.resolve().parent.parent / "base", *([] if named is None else [Path(named)])]
    for place in places:
        if _config_text(place) is not None and _config_text(place) == _config_text(checkpoint):
            return place
    where = "" if named is None else f" ({named}, when it was trained, is not here or another model)"
    raise CheckpointError(
        f"{checkpoint} holds adapters alone and its base is not beside it{where}: pass --base HF_DIR, the Hugging Face directory the run "
        "started from"
    )


def _config_text(directory: Path) -> bytes | None:
    """Returns a base's config.json in either form, None where there is none."""
    folder = directory / hf_files.CONTEXT / hf_files.HF_FILES if is_nemo(directory) else directory
    try:
        return (folder / "config.json").read_bytes()
    except OSError:
        return None


def recorded_base(checkpoint: Path) -> str | None:
    """Returns the model.path of the run that wrote a checkpoint, None where it does not say."""
    record = checkpoint / hf_files.CONTEXT / "run.json"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
