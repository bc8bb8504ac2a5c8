"""Files and settings on one command line, as the commands of `asft data` take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_nemo.config.schema import RunConfig


_HELD_AGAINST = {
    "data.train": ("data.templates", "data.weights"),
    "data.validation": ("data.validation_templates", "trainer.validate_every"),
}


def files_and_run(words: Sequence[str], *, command: str) -> tuple[list[str], RunConfig]:
    """The files among the words, and the run that the other words describe.

    Args:
        words: files, and settings `key=value`; a word that is a file's name is a file.
        command: that got them, for the error.

    Raises:
        UserError: there is no file, or a setting is wrong.
    """
    files = [word for word in words if "=" not in word or Path(word).exists()]
    settings = [word for word in words if word not in files]
    if not files:
        raise UserError(f"{command} got no file: name at least one")
    from asft_nemo.config.load import compose

    given = {word.partition("=")[0] for word in settings}
    # Only the data settings and the tokenizer matter here, so the rest of a run need not be spelt out.
    fill = ("recipe=tiny_cpu", "objective=sft")
    missing = [word for word in fill if word.partition("=")[0] not in given]
    # What has a value for each entry is held against these.
    for key, needed in _HELD_AGAINST.items():
        if key not in given and given.intersection(needed):
            missing.append(f"{key}={json.dumps(files)}")
            if key == "data.validation" and "trainer.validate_every" not in given:
                missing.append("trainer.validate_every=1")
    return files, compose([*missing, *settings], check_inputs=False)


def questions_of(suites: str) -> dict[str, list[str]]:
    """What evaluation suites ask, by suite.

    Args:
        suites: as for `asft eval --suite`, separated by commas.

    Raises:
        UserError: a suite is unknown or not here.
    """
    from asft_eval.errors import EvaluationError
    from asft_eval.suites.questions import asked_by

    try:
        return asked_by(suites.split(","))
    except EvaluationError as error:
        raise UserError(str(error)) from error


def tokenizer_dir(model_path: str) -> Path:
    """The Hugging Face directory of a model: itself, or what a NeMo checkpoint has inside."""
    inside = Path(model_path) / "context" / "hf"
    return inside if inside.is_dir() else Path(model_path)
