"""Files and folders that settings name, for `asft launch`: nodes run the stages in run.dir, where relative names mean something else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asft_nemo.config.hub_ids import hub_id
from asft_nemo.config.schema import REQUIRED, RunConfig, walk

FOLDERS = ("model.path", "reference.cache_dir", "peft.adapter")
FILES = ("data.train", "data.validation", "eval.suites", "eval.drift")


def is_path(key: str, entry: str) -> bool:
    """Whether a setting's entry names a file or folder: neither a dataset of the hub nor a published suite."""
    if key == "eval.drift":
        return True
    path = Path(entry)
    if key == "eval.suites":
        return path.is_file() or bool(path.suffix) or (len(path.parts) > 1 and hub_id(entry) is None)
    return key in FOLDERS or path.exists() or hub_id(entry) is None


def entries_of(value: Any) -> tuple[str, ...]:
    """The names in a setting that has one, several, or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def named_paths(run: RunConfig) -> Iterator[tuple[str, Path]]:
    """Key and absolute path of everything but run.dir that the settings name; a path may hold the signs of a pattern."""
    settings = dict(walk(run))
    for key in (*FOLDERS, *FILES):
        for entry in entries_of(settings[key]):
            if entry != REQUIRED and is_path(key, entry):
                yield key, Path(os.path.abspath(entry))


def made_absolute(run: RunConfig) -> dict[str, Any]:
    """The settings that have relative names, with absolute ones, as they are meant in the current directory."""
    settings = dict(walk(run))
    changed: dict[str, Any] = {}
    for key in (*FOLDERS, *FILES):
        value = settings[key]
        if isinstance(value, str):
            absolute: Any = os.path.abspath(value)
        else:
            absolute = tuple(
                os.path.abspath(entry) if is_path(key, entry) else entry for entry in value or ()
            )
        if value and absolute != value:
            changed[key] = absolute
    return changed
