"""A launch has its folder for itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.errors import ConfigError, UserError
from asft_nemo.launching import record

JOB = record.Job("train", "7", ("import",), "train.sh", None, "logs")
RECORD = record.Record(
    "tiny", "slurm", "ours", (JOB, record.Job("export", "8", (), "e.sh", "e_sbatch.sh", "logs"))
)


def test_one_launch_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with record.claim(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"being launched by process {os.getpid()} of .*: wait for it"):
            record.claim(tmp_path / "run")
    with record.claim(tmp_path / "run"):
        pass  # what an earlier launch left is nobody's


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\): set run.dir to a folder"):
        record.claim(tmp_path / "file" / "run")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert record.read(tmp_path) == RECORD
    with pytest.raises(UserError, match=r"holds no launch\.json: give the run.dir of a run"):
        record.read(tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"jobs"', '"tasks"'),
        lambda text: text.replace('"stage"', '"name"'),
        lambda text: text.replace('"format"', '"form"'),
        lambda text: text.replace('"7"', "7"),
        lambda text: json.dumps({**json.loads(text), "jobs": [1]}),
        lambda text: json.dumps({**json.loads(text), "jobs": []}),
        lambda text: "\udcff",
    ],
)
@pytest.mark.usefixtures("keep_logging_and_warnings")
@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_damaged_record_is_one_sentence(
    command: str, change: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RECORD.write(tmp_path)
    file = tmp_path / record.RECORD
    file.write_bytes(change(file.read_text()).encode(errors="surrogateescape"))
    assert cli.main([command, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{file} is damaged: once `squeue --me` shows no job of this run, move" in said
    assert "Traceback" not in said


def test_a_record_of_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / record.RECORD).write_text(json.dumps({"format": 2, "tasks": {}}))
    with pytest.raises(UserError, match="is of format 2, and this asft reads format 1: use the asft that"):
        record.read(tmp_path)
