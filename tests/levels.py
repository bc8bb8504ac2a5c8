"""Hydra's part of composing, remembered for a whole session of tests: many of them compose the same experiments and clusters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from asft_nemo.config import load
from asft_nemo.config.paths import project_dir

_compose_level = load._compose_level
_found: dict[tuple[Any, ...], dict[str, Any]] = {}


def remembered(folder: Path, primary: str, choices: Mapping[str, str]) -> dict[str, Any]:
    """What `load._compose_level` gives, composed once for each choice of group files; of the project's own conf/, which no test changes."""
    if folder != project_dir() / "conf":
        return _compose_level(folder, primary, choices)
    key = (folder, primary, *choices.items())
    if key not in _found:
        _found[key] = _compose_level(folder, primary, choices)
    return copy.deepcopy(_found[key])


@pytest.fixture(autouse=True)
def remember_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `compose` of a test takes Hydra's part from there."""
    monkeypatch.setattr(load, "_compose_level", remembered)
