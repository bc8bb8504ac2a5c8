"""Settings of real runs, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VALID = [5, 0, 32, 1, 17, 3, 0, 20]  # learned tokens of the examples
TP2_PP2 = {"parallel.tp_size": 2, "parallel.pp_size": 2}
NOT_TIMES = (
    "seconds",
    "reference_seconds",
    "tokens_per_second",
    "tflops_per_gpu",
    "reference_tflops_per_gpu",
)


def settings_of(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """asft at TP2 x PP2 on four ranks; `more` as section__key."""
    named = {key.replace("__", "."): value for key, value in more.items()}
    return {
        **TP2_PP2,
        "run.world_size": 4,
        "objective.name": "asft",
        "objective.kl_weight": 0.1,
        "model.path": str(model),
        "run.dir": str(folder),
        "optim.lr": 3e-3,
        **named,
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, step by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def alarms_of(folder: Path) -> list[dict[str, Any]]:
    """What a run warned of."""
    file = folder / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two equal runs log alike."""
    return [{key: value for key, value in line.items() if key not in NOT_TIMES} for line in lines]


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, optimizer state included, read without a model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint / "weights")
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found
