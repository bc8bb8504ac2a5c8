"""What lies beside the weights of a Hugging Face checkpoint, and what an import remembers of it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asft_nemo.checkpoint.staging import write_synced
from asft_nemo.errors import CheckpointError, UserError

WEIGHTS = "weights"
CONTEXT = "context"
HF_FILES = "hf"
ORIGIN = "asft.json"
FORMAT_VERSION = 1

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
)
# transformers keeps further chat templates in a folder; every other folder on the hub holds weights in other
# formats.
_KEPT_FOLDERS = ("additional_chat_templates",)
# Adapters that were merged into the weights beside them, say. Where transformers finds this file it loads the base that it names instead.
_OF_ADAPTERS = "adapter_config.json"
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Origin:
    """Where an imported checkpoint came from: `context/asft.json`.

    Attributes:
        format_version: version of this file and of the checkpoint's layout.
        family: the model family.
        vocab_size: rows of the vocabulary without padding.
        source_dtype: the dtype most numbers had in the Hugging Face checkpoint.
        source_dtype_exceptions: Megatron tensor -> dtype, where it was another.
        source: the Hugging Face directory, as `asft_nemo.config.run_folder.model_source` tells it; None where an older import wrote this.
    """

    format_version: int
    family: str
    vocab_size: int
    source_dtype: str
    source_dtype_exceptions: dict[str, str]
    source: dict[str, Any] | None = None

    def dtype_of(self, megatron: str) -> torch.dtype:
        """Returns the dtype a tensor had in the Hugging Face checkpoint."""
        return parse_dtype(self.source_dtype_exceptions.get(megatron, self.source_dtype))


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Returns a floating dtype from its name.

    Raises:
        UserError: it is none of bf16, fp16, fp32 (or their long names).
    """
    dtype = name if isinstance(name, torch.dtype) else _DTYPES.get(name)
    if dtype not in _DTYPES.values() or dtype is None:
        raise UserError(f"dtype={name} is not supported: choose one of {', '.join(_DTYPES)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name Hugging Face writes in config.json, for example `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def is_weight_file(name: str) -> bool:
    """Whether a file of a Hugging Face directory holds weights, or is their index."""
    return name.endswith(_WEIGHT_SUFFIXES)


def copy_hf_files(source: Path, target: Path) -> list[str]:
    """Copies everything that is not a weight byte for byte, and syncs it; returns the relative paths.

    Hidden files, folders of other formats and the description of adapters, whose weights are none of the
    model's, stay behind. Links are followed, as a hub cache consists of them.
    """
    target.mkdir(parents=True, exist_ok=True)
    copied: list[str] = []
    for folder in (source, *(source / name for name in _KEPT_FOLDERS)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.startswith(".") or not path.is_file() or is_weight_file(path.name):
                continue
            if path.name == _OF_ADAPTERS:
                continue
            relative = path.relative_to(source)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
            descriptor = os.open(target / relative, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            copied.append(str(relative))
    return copied


def write_origin(context: Path, origin: Origin) -> None:
    """Writes `asft.json` into a checkpoint's context directory."""
    write_synced(context / ORIGIN, (json.dumps(asdict(origin), indent=2) + "\n").encode())


def read_origin(checkpoint: Path) -> Origin | None:
    """Returns what a checkpoint remembers of its origin, None where it has no `context/asft.json`.

    Raises:
        CheckpointError: the file is malformed, or of a newer format.
    """
    path = checkpoint / CONTEXT / ORIGIN
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        origin = Origin(**values)
        if not isinstance(values["format_version"], int) or not isinstance(
            values["source_dtype_exceptions"], dict
        ):
            raise TypeError("a field is of another type")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is malformed ({error}): import the base model again") from error
    if origin.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format {origin.format_version}, newer than {FORMAT_VERSION}: upgrade asft_nemo"
        )
    return origin


def weights_directory(checkpoint: Path) -> Path:
    """Returns the directory of the distributed checkpoint inside a NeMo checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory: give the path of a checkpoint")
    weights = checkpoint / WEIGHTS
    if not weights.is_dir():
        hint = ""
        if (checkpoint / "config.json").is_file():
            hint = " (this looks like a Hugging Face one: import it)"
        elif (checkpoint / "adapter_config.json").is_file():
            hint = " (these are PEFT adapters: train on with peft.adapter, or merge them with peft)"
        elif (checkpoint / "checkpoints" / "latest").exists():
            hint = (
                f" (this is a run's folder: its latest checkpoint is {checkpoint / 'checkpoints' / 'latest'})"
            )
        raise CheckpointError(
            f"{checkpoint} holds no {WEIGHTS}/{hint}: give the directory of a NeMo checkpoint"
        )
    return weights


def hf_files_directory(checkpoint: Path, base_dir: str | Path | None) -> Path:
    """Returns where to take config.json and tokenizer from: `base_dir`, else the checkpoint's own.

    Raises:
        CheckpointError: there is none.
    """
    if base_dir is not None:
        return Path(base_dir)
    directory = checkpoint / CONTEXT / HF_FILES
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} does not hold the base model's files ({CONTEXT}/{HF_FILES}/config.json): pass"
            " --base HF_DIR, the"
            " Hugging Face directory the run started from"
        )
    return directory
