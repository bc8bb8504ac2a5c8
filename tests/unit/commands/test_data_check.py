"""`asft data check`: what it counts, shows and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config.paths import project_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
TINY = project_dir() / "assets" / "tiny-base"


def test_data_check_counts_and_measures(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows), "data=gsm8k"]) == 0
    out = capsys.readouterr().out
    assert "9 rows, 9 usable, 0 bad" in out
    assert "median" in out


def test_data_check_prints_every_bad_row_and_ends_with_two(
    rows: Path, bad_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(rows), str(bad_rows), "data.fields.prompt=question", "data.fields.response=answer"]
    assert cli.main(["data", "check", *words]) == 2
    captured = capsys.readouterr()
    assert "12 rows, 10 usable, 2 bad" in captured.out
    assert captured.err.splitlines() == [
        f"{bad_rows}:2: not JSON: Expecting value at column 1",
        f"{bad_rows}:3: field 'answer' is empty",
    ]


def test_data_check_as_json(bad_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "--json", str(bad_rows), "data=gsm8k", "data.sequence_length=9"]) == 2
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["rows"], answer["usable"], answer["bad"], answer["too_long"]) == (3, 1, 2, 1)
    assert answer["bad_rows"][0] == {
        "file": str(bad_rows),
        "line": 2,
        "reason": "not JSON: Expecting value at column 1",
    }
    assert answer["sequence_length"] == 9
    assert set(answer["lengths"]) == {"shortest", "median", "95th percentile", "longest"}
    assert sum(found["rows"] for found in answer["histogram"]) == 1
    assert answer["duplicates"]["exact"] == 0
    assert answer["learned_share"] is None
    assert answer["entries"][bad_rows.stem]["bad"] == 2
    assert captured.err == ""


def test_data_check_sums_up_bad_rows_and_shows_examples(
    rows: Path, bad_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--show",
        "1",
        str(rows),
        str(bad_rows),
        "data.fields.prompt=question",
        "data.fields.response=answer",
    ]
    assert cli.main(["data", "check", *words, "--color=never"]) == 2
    out = capsys.readouterr().out
    assert f"  1 x not JSON: Expecting value at column ... (first: {bad_rows}:2)" in out
    assert "% learned" in out
    assert out.count("[[") == 2 + 1  # one example of each entry, and the legend
    assert f"\n{rows}:1: " in out
    assert "\033" not in out
    assert cli.main(["data", "check", *words[2:], "--show=-1"]) == 2
    assert "--show=-1 is negative" in capsys.readouterr().err


def test_data_check_holds_the_tokenizer_against_the_model(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "vocab_size": 100}))
    assert cli.main(["data", "check", str(rows), f"model.path={model}"]) == 2
    assert "tokens but the model only 100 rows: use the model's own tokenizer" in capsys.readouterr().err


def test_data_check_finds_the_form_of_the_rows_itself(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows)]) == 0
    assert "9 rows, 9 usable, 0 bad" in capsys.readouterr().out


def test_data_check_of_wholly_bad_files(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(rows), "data=alpaca"]) == 2
    captured = capsys.readouterr()
    assert "9 rows, 0 usable, 9 bad" in captured.out
    assert "no field 'instruction', its fields are answer, question: set data.fields.prompt" in captured.err


# --- checkpoints and evaluation --------------------------------------------------------------------------------
