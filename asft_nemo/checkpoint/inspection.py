"""What a checkpoint holds, from its headers and descriptions alone: no tensor is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.adapters import AdapterDescription, adapter_description
from asft_nemo.checkpoint.blocks import MODULE_PREFIX
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.peft_adapter import PEFT_WEIGHTS
from asft_nemo.checkpoint.peft_config import PEFT_CONFIG
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader, read_header
from asft_nemo.errors import CheckpointError
from asft_nemo.model import ModelSpec, read_model_spec


@dataclass(frozen=True)
class Inspection:
    """One checkpoint.

    Attributes:
        path: what was looked at; of a run's folder its latest checkpoint.
        kind: ``huggingface``, ``nemo`` (a whole model), ``nemo adapters`` or ``peft adapters``.
        spec: the architecture; None where the folder does not tell it (PEFT).
        num_tensors: the model's tensors, or the adapters'.
        parameters: numbers in them; padding rows of the vocabulary included.
        dtypes: dtype -> numbers of the model's tensors.
        nbytes: size of all files below `path`.
        optimizer_tensors: tensors of the optimizer's state; 0 where there is none.
        adapters: rank, alpha and targets, of adapters.
        run: what run.json says of the run that wrote it: objective, layout, precision, versions, commit, and the step; None elsewhere.
    """

    path: Path
    kind: str
    spec: ModelSpec | None
    num_tensors: int
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    optimizer_tensors: int = 0
    adapters: AdapterDescription | None = None
    run: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        spec = self.spec
        return {
            "path": str(self.path),
            "kind": self.kind,
            "family": None if spec is None else spec.family,
            "num_layers": None if spec is None else spec.num_layers,
            "hidden_size": None if spec is None else spec.hidden_size,
            "vocab_size": None if spec is None else spec.vocab_size,
            "tie_word_embeddings": None if spec is None else spec.tie_word_embeddings,
            "num_tensors": self.num_tensors,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "bytes": self.nbytes,
            "optimizer_tensors": self.optimizer_tensors,
            "adapters": None if self.adapters is None else json.loads(self.adapters.to_json()),
            "run": self.run,
        }


def inspect(path: str | Path) -> Inspection:
    """Looks at a Hugging Face or PEFT directory, a NeMo checkpoint, or a run's folder (its latest checkpoint).

    Raises:
        CheckpointError: it is none of these, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give the path of a checkpoint")
    latest = path / "checkpoints" / "latest"
    if latest.is_dir():
        path = latest.resolve()
    if (path / hf_files.WEIGHTS).is_dir():
        return _nemo(path)
    if (path / PEFT_CONFIG).is_file():
        return _peft(path)
    if (path / "config.json").is_file():
        return _huggingface(path)
    raise CheckpointError(
        f"{path} holds neither {hf_files.WEIGHTS}/, config.json nor {PEFT_CONFIG}: give a NeMo checkpoint, a run's folder, or a Hugging Face "
        "or PEFT directory"
    )


def _huggingface(path: Path) -> Inspection:
    spec = read_model_spec(path)
    with SafetensorsReader(path) as reader:
        sizes = [(entry.dtype, torch.Size(entry.shape)) for entry in reader.tensors.values()]
    return _inspection(path, "huggingface", spec, sizes)


def _nemo(path: Path) -> Inspection:
    context = path / hf_files.CONTEXT / hf_files.HF_FILES
    adapters = adapter_description(path)
    with DistReader(path / hf_files.WEIGHTS) as reader:
        model = [
            (value.properties.dtype, value.size)
            for key, value in reader.tensors.items()
            if key.startswith(MODULE_PREFIX)
        ]
        optimizer = sum(key.startswith("optimizer.") for key in reader.tensors)
    return _inspection(
        path,
        "nemo" if adapters is None else "nemo adapters",
        read_model_spec(context) if (context / "config.json").is_file() else None,
        model,
        optimizer_tensors=optimizer,
        adapters=adapters,
        run=_run(path),
    )


def _peft(path: Path) -> Inspection:
    file = path / PEFT_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        targets = config["target_modules"]
        adapters = AdapterDescription(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} does not describe LoRA adapters ({error!r}): fetch it again"
        ) from error
    if not (path / PEFT_WEIGHTS).is_file():
        raise CheckpointError(f"{path} holds no {PEFT_WEIGHTS}: save the adapters as safetensors")
    sizes = [(entry.dtype, torch.Size(entry.shape)) for entry in read_header(path / PEFT_WEIGHTS).values()]
    return _inspection(path, "peft adapters", None, sizes, adapters=adapters)


def _inspection(
    path: Path, kind: str, spec: ModelSpec | None, sizes: list[tuple[torch.dtype, torch.Size]], **more: Any
) -> Inspection:
    dtypes: Counter[str] = Counter()
    for dtype, size in sizes:
        dtypes[hf_files.dtype_name(dtype)] += size.numel()
    files = (file for file in path.rglob("*") if file.is_file())
    return Inspection(
        path=path,
        kind=kind,
        spec=spec,
        num_tensors=len(sizes),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        nbytes=sum(file.stat().st_size for file in files),
        **more,
    )


def _run(checkpoint: Path) -> dict[str, Any] | None:
    """What the run that wrote a checkpoint says of itself; None where the checkpoint is not in a run's folder."""
    resolved = checkpoint.resolve()
    file = resolved.parent.parent / "run.json"
    if resolved.parent.name != "checkpoints" or not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        config = record["config"]
        return {
            "step": int(resolved.name.removeprefix("step_")),
            "objective": config["objective"]["name"],
            "kl_weight": config["objective"]["kl_weight"],
            "precision": config["precision"],
            "parallel": config["parallel"],
            "world_size": config["run"]["world_size"],
            "model": config["model"]["path"],
            "git_commit": record.get("git_commit"),
            "versions": record.get("versions"),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is malformed ({error!r}): restore it, or move the checkpoint out of the run's folder"
        ) from error
