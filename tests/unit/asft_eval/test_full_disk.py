"""A disk that fills up while asft eval writes: one sentence that names the file, exit code 2, and with room the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from asft_eval.requests import Journal
from asft_eval.result import read_result, write_whole

from asft_nemo import cli

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")
FULL = Path("/dev/full")  # every write fails as on a full disk
PAGE = os.sysconf("SC_PAGE_SIZE")  # what each file takes at least
ROW = {"request": "1", "completion": "an answer"}


def become(disk: Path, nbytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", str(disk)], check=True)


def asked(model: Path, folder: Path, out: Path) -> list[str]:
    suite = folder / "words.jsonl"
    suite.write_text("".join(json.dumps({"prompt": f"copy {x}:", "answer": x}) + "\n" for x in "ABC"))
    return ["eval", str(model), "--suite", str(suite), "--max-tokens", "3", "--out", str(out)]


@pytest.mark.parametrize(
    ("pages", "file"),
    [(0, ""), (1, r"/unfinished\.json"), (2, r"/samples\.jsonl"), (3, r"/samples\.jsonl")],
    ids=["the folder's lock", "whose answers", "the first answers", "graded answers"],
)
def test_the_sentence_names_what_cannot_be_written(
    pages: int, file: str, disk: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk / "out"
    words = asked(model_dir, tmp_path, out)
    (disk / "others").write_bytes(bytes(PAGE))
    become(disk, PAGE * (1 + pages))
    assert cli.main(words) == 2
    (sentence,) = re.findall("^asft: .*", capsys.readouterr().err, re.MULTILINE)
    assert re.search(
        rf"^asft: {out}{file} cannot be (used|written) \(No space left on device\): make room, or ", sentence
    )
    assert not list(disk.rglob("*.unfinished"))
    assert not (out / "results.json").exists()
    assert not (out / "results.lock").exists()
    become(disk, 1 << 20)
    assert cli.main(words) == 0
    assert read_result(out).suites["words"].n == 3


def test_without_a_disk_to_fill(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.jsonl.unfinished").symlink_to(FULL)
    words = asked(model_dir, tmp_path, out)
    assert cli.main(words) == 2
    assert (
        f"asft: {out}/samples.jsonl cannot be used (No space left on device): make" in capsys.readouterr().err
    )
    assert cli.main(words) == 0


def test_the_journal_and_whole_files_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    journal = Journal(path, ["1"])
    path.unlink()
    path.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as found:
        journal.add([ROW])
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))
    whole = tmp_path / "results.json"
    (tmp_path / "results.json.unfinished").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as found:
        write_whole(whole, "{}")
    assert found.value.filename == str(whole)
    assert [x.name for x in tmp_path.iterdir()] == ["samples.jsonl"], "no part of a file is left"
    with pytest.raises(OSError, match="No such file") as found:
        write_whole(tmp_path / "none" / "x", "{}")
    assert found.value.filename == str(tmp_path / "none" / "x.unfinished"), "what the system names stays"
