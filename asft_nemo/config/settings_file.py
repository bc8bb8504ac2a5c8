"""Composed settings in a file: what a launch has composed and checked once is what its stages run, from any conf/ and in any container.

The file is JSON whose `config` holds every setting: `launch/settings.json`, which `asft launch` writes into run.dir, or any run's run.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asft_nemo
from asft_nemo.config.load import compose_from
from asft_nemo.config.schema import RunConfig, walk
from asft_nemo.errors import ConfigError

_SHOWN = 5  # unknown settings in the sentence


def compose_file(file: Path, overrides: Sequence[str] = (), *, check_inputs: bool = True) -> RunConfig:
    """The run that a file's settings describe.

    Args:
        file: the file.
        overrides: single settings, `key=value`, that are to be others.
        check_inputs: as `asft_nemo.config.load.compose`.

    Raises:
        ConfigError: the file is no such file or another version's, an override is no single setting, or a rule is broken.
    """
    return compose_from(settings_in(file), overrides, source=str(file), check_inputs=check_inputs)


def settings_in(file: Path) -> dict[str, Any]:
    """A file's settings, nested.

    Raises:
        ConfigError: it cannot be read, is something else, or has settings that this version does not know.
    """
    values = _read(file)
    unknown = _unknown(values["config"], {key for key, _ in walk(RunConfig())})
    if unknown:
        raise ConfigError(
            f"{file} was written by another version of asft_nemo than this one ({asft_nemo.__version__}), which does not know "
            f"{', '.join(unknown[:_SHOWN])}: use that version, for example an image of it, or launch again with this one"
        )
    return values["config"]


def _unknown(values: dict[str, Any], known: set[str], prefix: str = "") -> list[str]:
    """Keys of settings that the schema does not have."""
    found: list[str] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found += _unknown(value, known, f"{key}.")
        elif key not in known:
            found.append(key)
    return found


def _read(file: Path) -> dict[str, Any]:
    which = "give launch/settings.json or run.json of a run"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): {which}") from None
    except ValueError:  # no JSON, or no text at all
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise ConfigError(f"{file} holds no composed settings: {which}")
    return values
