"""Finding recipes by name: a recipe is a module of the recipes/ folder with a function `fragment()`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from asft_nemo.config.paths import project_dir
from asft_nemo.errors import ConfigError

_GPU = "h100-80gb"  # of a recipe that names none
_LISTED = 12  # names in a sentence
_PACKAGE = "asft_nemo_recipes"  # the name under which the folder is imported, in a clone and in a wheel alike


def known_recipes() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    files = (project_dir() / "recipes").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem not in ("base", "__init__")))


def recipe_fragment(name: str) -> Mapping[str, Any]:
    """The settings a recipe gives, as nested plain values.

    Raises:
        ConfigError: no recipe has this name.
    """
    return _recipe(name).fragment()


def recipe_model(name: str) -> str | None:
    """The hub id of the model that a recipe is made for; None where the model is a file of the project.

    Raises:
        ConfigError: no recipe has this name.
    """
    return getattr(_recipe(name), "MODEL", None)


def recipe_gpu(name: str) -> str:
    """The GPU that a recipe is made for, as `asft plan --gpu` calls it.

    Raises:
        ConfigError: no recipe has this name.
    """
    return getattr(_recipe(name), "GPU", _GPU)


def _recipe(name: str) -> ModuleType:
    known = known_recipes()
    if name not in known:
        raise ConfigError(f"unknown recipe '{name}': {suggest(name, known)}")
    _load_package(project_dir() / "recipes")
    return importlib.import_module(f"{_PACKAGE}.{name}")


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of an 'unknown' sentence: the nearest names, if any are near, and what is known."""
    near = difflib.get_close_matches(name, known, n=3 if len(known) > _LISTED else 1)
    meant = " or ".join(f"'{one}'" for one in near)
    return f"did you mean {meant}? ({listed(known)})" if near else listed(known)


def listed(known: Sequence[str]) -> str:
    """All known names, sorted; of many the shortest, which the others are variants of."""
    shown = sorted(sorted(known, key=lambda name: (len(name), name))[:_LISTED])
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"known are {', '.join(shown)}{more}"


def _load_package(folder: Path) -> ModuleType:
    if _PACKAGE in sys.modules:
        return sys.modules[_PACKAGE]
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)
    return package
