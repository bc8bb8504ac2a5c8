"""What a run's folder shows before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

BASE_FOLDER = "base"  # model.path in NeMo form, where it is a Hugging Face directory


def has_trained(folder: Path) -> bool:
    """Whether a run in `folder` took a step: what a start that was refused left there, run.json too, is nobody's run."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, which need not be there yet; None where nothing speaks against it."""
    # os.path.exists: below a folder that may not be entered, Path.exists raises
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        return f"{there} is a file"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    return f"{there} is not writable for {os.environ.get('USER', f'user {os.getuid()}')}"


def model_source(folder: Path) -> dict[str, Any]:
    """What tells a Hugging Face directory from others without reading its weights: its place, and names, bytes and times of their files."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return {
        "path": str(folder.resolve()),
        "weights": [[name, state.st_size, state.st_mtime_ns] for name, state in files],
    }


def other_base(base: Path, model: Path) -> str | None:
    """Why `base` is no import of the weights that `model` holds now; None where it is one.

    Args:
        base: a NeMo checkpoint that an import wrote.
        model: a Hugging Face directory; only its place is compared where it is not there.
    """
    cure = f"choose another run.dir, or remove {base}: it is imported again"
    try:
        made_from = json.loads((base / "context" / "asft.json").read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        made_from = None
    if not isinstance(made_from, dict):
        return f"{base} does not say which model it was made from, and model.path={model}: {cure}"
    now = model_source(model)
    if made_from.get("path") != now["path"]:
        return f"{base} was made from {made_from.get('path')}, and model.path={model}: {cure}"
    if model.is_dir() and made_from.get("weights") != now["weights"]:
        return f"{base} was made from {model} before its weights changed: {cure}"
    return None
