"""What a run's folder shows before it is used."""

from __future__ import annotations

import os
from pathlib import Path


def has_trained(folder: Path) -> bool:
    """Whether a run in `folder` took a step: what a start that was refused left there, run.json too, is nobody's run."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, which need not be there yet; None where nothing speaks against it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return f"{there} is a file"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    return f"{there} is not writable for {os.environ.get('USER', f'user {os.getuid()}')}"
