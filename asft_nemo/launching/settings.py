"""The settings that the ranks of a launch read, in run.dir: what was launched is what runs, whatever becomes of conf/ and recipes/ meanwhile.

A container has others of its own, and after a day in the queue somebody may have edited those that a launch was composed from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asft_nemo
from asft_nemo.config.schema import RunConfig, from_dict, to_dict, walk
from asft_nemo.config.settings_file import settings_in
from asft_nemo.errors import ConfigError
from asft_nemo.run_dir import write_json

_SHOWN = 5  # differences in the sentence


def settings_file(folder: Path) -> Path:
    """Where a launch leaves them; `folder` is run.dir."""
    return folder / "launch" / "settings.json"


def write_settings(folder: Path, run: RunConfig, *, words: Sequence[str]) -> None:
    """Leaves them in run.dir.

    Args:
        folder: run.dir.
        run: the settings of its ranks.
        words: of the command line that gave them, for whoever reads the file.
    """
    file = settings_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"asft_nemo": asft_nemo.__version__, "words": list(words), "config": to_dict(run)})


def refuse_other_settings(run: RunConfig) -> None:
    """Compares what this rank was told with what was launched; nothing is compared where no launch has left it.

    Raises:
        ConfigError: they differ, by words that somebody has added to the rank's command line.
    """
    file = settings_file(Path(run.run.dir))
    if not file.is_file():
        return
    launched = dict(walk(from_dict(settings_in(file))))
    other = [
        f"{key}={json.dumps(value)} here, {json.dumps(launched[key])} there"
        for key, value in walk(run)
        if value != launched[key]
    ]
    if other:
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise ConfigError(
            f"this rank was told other settings than those that were launched ({file}): {'; '.join(other[:_SHOWN])}{more}. Leave the words "
            "behind --settings out, or launch again with them"
        )


def given(run: RunConfig) -> Mapping[str, Any]:
    """The settings of a run that are not the schema's defaults, for a reader of a plan."""
    default = dict(walk(RunConfig()))
    return {key: value for key, value in walk(run) if value != default[key]}
