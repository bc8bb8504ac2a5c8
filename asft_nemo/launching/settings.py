"""The settings that a launch's ranks must have, in run.dir: a rank composes them once more, from the conf/ and recipes/ of its own machine.

In a container these are the image's, and after a day in the queue somebody may have edited them: other settings would train something else
without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import RunConfig, to_dict, walk
from asft_nemo.errors import ConfigError
from asft_nemo.run_dir import write_json

FILE = "launch/settings.json"
_OF_A_STAGE = "trainer.resume"  # words of `train` alone
_SHOWN = 5  # differences in the sentence


def write_settings(folder: Path, run: RunConfig) -> None:
    """Says what ranks must find; `folder` is run.dir."""
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, _comparable(run))


def refuse_other_settings(run: RunConfig) -> None:
    """Compares what this rank has composed with what was launched; nothing is compared where no launch has said it.

    Raises:
        ConfigError: they differ.
    """
    file = Path(run.run.dir) / FILE
    if not file.is_file():
        return
    launched, here = json.loads(file.read_text(encoding="utf-8")), _comparable(run)
    # A setting that only one of two versions knows is no difference, unless it was launched.
    other = [
        f"{key}={json.dumps(here.get(key, 'unknown'))} here, {json.dumps(value)} there"
        for key, value in launched.items()
        if here.get(key, "unknown") != value
    ]
    if other:
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise ConfigError(
            f"conf/ or recipes/ of {project_dir()} give other settings than those that were launched ({file}): "
            f"{'; '.join(other[:_SHOWN])}{more}. Launch again, or give the image the conf/ that it was launched with"
        )


def _comparable(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value; what ships with the project is where the project is."""
    keys = [key for key, _ in walk(run) if key != _OF_A_STAGE]
    text = json.dumps(to_dict(run)).replace(json.dumps(str(project_dir()))[1:-1], "${project}")
    values = json.loads(text)
    return {key: _at(values, key) for key in keys}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
