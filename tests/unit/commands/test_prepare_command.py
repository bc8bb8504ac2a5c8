"""asft data prepare: what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asft_nemo import cli

ROOT = Path(__file__).parents[3]
MODEL = f"model.path={ROOT / 'assets' / 'tiny-base'}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"add {number} and 1", "answer": f"{number + 1}"} for number in range(9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def prepare(*words: object) -> int:
    return cli.main(["data", "prepare", MODEL, *map(str, words)])


def test_files_become_a_directory_once(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(rows, "--out", out, "--workers", 2) == 0
    said = capsys.readouterr().out
    assert said.startswith("9 rows, 9 examples, ")
    assert f"1 file tokenised; train with data.train=[{out}]" in said
    assert prepare(rows, "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"{out} is up to date: 9 rows, 9 examples, ")
    assert cli.main(["data", "check", str(out), MODEL]) == 2
    assert "give the files it was made from" in capsys.readouterr().err


def test_the_answer_as_json(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"prompt": "Add 4 and 1!"}) + "\n")
    words = ("data.template=raw", "--out", tmp_path / "out", "--json", "--drop-contaminated", suite)
    assert prepare(rows, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["examples"], found["contaminated_rows"], found["bad_rows"]) == (9, 8, 1, 0)
    assert (found["tokenised"], found["used_again"], found["unchanged"]) == (1, 0, False)
    [source] = found["sources"]
    assert (source["file"], source["bytes"]) == (str(rows), rows.stat().st_size)
    assert 0 < found["learned"] < found["tokens"] == source["tokens"]
    left_out = json.loads((tmp_path / "out" / "manifest.json").read_text())["suites"]
    assert left_out["names"] == [str(suite)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{rows}"], "the following arguments are required: --out"),
        (["--out", "{out}", "data.template=raw"], "asft data prepare got no file: name at least one"),
        (["{rows}", "--out", "{rows}"], "rows.jsonl is a file: give a directory"),
        (["{rows}", "--out", "{out}", "--workers", "0"], "'0' is no number of processes: give 1 or more"),
        (
            ["{rows}", "--out", "{out}", "--drop-contaminated", "math5000"],
            "there is no suite or file math5000: did you mean 'math500'? choose one of math500, gsm8k",
        ),
        (["nowhere.jsonl", "--out", "{out}"], "nowhere.jsonl does not exist"),
        (["{rows}", "--out", "{out}", "data.fields.messages=chat"], "9 bad rows: correct them, or set"),
        (["{rows}", "--out", "{out}", "data.template=chatty"], "data.template=chatty"),
        (
            ["{rows}", "{rows}", "--out", "{out}", "data.templates=[raw,alpaca]"],
            "takes no data.templates: set",
        ),
        (
            ["{rows}", "--out", "{out}", "data.templates=[raw,alpaca]"],
            "a directory of its own with data.template",
        ),
        (
            ["{rows}", "--out", "{out}", "data.validation_templates=[raw]"],
            "takes no data.validation_templates: set",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_and_ends_with_two(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    out = tmp_path / "out"
    assert prepare(*(word.format(rows=rows, out=out) for word in words)) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "Traceback" not in said
    assert not (out / "manifest.json").exists()
