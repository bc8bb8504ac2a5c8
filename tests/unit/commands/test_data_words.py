"""Settings that have a value for each entry are held against the files on the command line."""

from __future__ import annotations

import pytest

from asft_nemo.commands.data_words import files_and_run
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import UserError

FILES = ["a.jsonl", "b.jsonl"]


def run_of(*settings: str) -> RunConfig:
    files, run = files_and_run([*FILES, *settings], command="asft data check")
    assert files == FILES
    return run


@pytest.mark.parametrize("setting", ["data.weights=[.3,.7]", "data.templates=[raw,alpaca]"])
def test_the_files_are_those_of_training(setting: str) -> None:
    assert run_of(setting).data.train == tuple(FILES)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.validation_templates=[raw,alpaca]"],
        ["trainer.validate_every=5"],
        ["data.validation_templates=[raw,alpaca]", "trainer.validate_every=5"],
    ],
)
def test_the_files_stand_for_those_of_validation(settings: list[str]) -> None:
    assert run_of(*settings).data.validation == tuple(FILES)


def test_what_is_given_stays() -> None:
    run = run_of(
        "data.train=[c.jsonl]",
        "data.templates=[raw]",
        "data.validation=[d.jsonl]",
        "data.validation_templates=[raw]",
        "trainer.validate_every=7",
    )
    assert (run.data.train, run.data.validation, run.trainer.validate_every) == (
        ("c.jsonl",),
        ("d.jsonl",),
        7,
    )


@pytest.mark.parametrize("key", ["weights", "templates", "validation_templates"])
def test_another_number_of_values_than_of_files_is_refused(key: str) -> None:
    value = "1" if key == "weights" else "raw"
    with pytest.raises(UserError, match=f"data.{key} has 3 entries and data.[a-z]+ 2"):
        run_of(f"data.{key}=[{value},{value},{value}]")
