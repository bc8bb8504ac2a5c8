"""What `asft doctor` says of disks: room, and leave to write, where runs, downloads and shared memory go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from asft_nemo.config.paths import hub_home
from asft_nemo.config.run_folder import unwritable

_LEAST_BYTES = 500_000_000  # checkpoints of the tiny model, twice over
_FREE_BYTES = 20 << 30  # a base, a checkpoint and an export of a 1.5B model
_SHARED_BYTES = (
    1 << 30
)  # containers have 64 MB unless told otherwise: too little for NCCL and for data workers


def disks() -> Iterator[tuple[str, str, bool]]:
    """What was looked at, what is there, and whether it must be mended."""
    yield ("disk here", *_here())
    yield ("Hugging Face cache", _cache(), False)
    shared = Path("/dev/shm")
    if shared.is_dir():
        low = ": start the container with --ipc=host or --shm-size=8g"
        yield ("shared memory", _room(shared, _SHARED_BYTES, low), False)


def gigabytes(size: int) -> str:
    """Bytes for people, down to megabytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _here() -> tuple[str, bool]:
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return "this folder has been removed: go to one that is there", True
    if why := unwritable(here):
        return f"{why}: go to another folder, for runs are written below the one you are in", True
    if shutil.disk_usage(here).free < _LEAST_BYTES:
        return _room(here, _LEAST_BYTES, ", too little for any run: make room or go to another disk"), True
    return _room(here, _FREE_BYTES, ", too little for checkpoints of any real model"), False


def _cache() -> str:
    """Where models and data sets of the hub are kept, which only those need who name one by its id."""
    place = hub_home(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME"))
    if place is None:
        return "nowhere, for this user has no home: set HF_HOME to a folder that can be written"
    if not place.is_absolute():
        return f"{place}, which is another one in every folder: set HF_HOME to an absolute path"
    if why := unwritable(place):
        return f"{place}, and nothing can be downloaded to it ({why}): set HF_HOME to a folder that can be written"
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return f"{place}, {_room(there, _FREE_BYTES, ', too little for a 7B model: set HF_HOME')}"


def _room(folder: Path, enough: int, low: str) -> str:
    free = shutil.disk_usage(folder).free
    return f"{gigabytes(free)} free{low if free < enough else ''}"
