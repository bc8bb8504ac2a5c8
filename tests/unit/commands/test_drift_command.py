"""asft eval --drift: with suites and alone, what it prints, and what it says of words that do not go together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from asft_nemo import cli

TINY = str(Path(__file__).resolve().parents[3] / "assets" / "tiny-base")

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "held_out.jsonl"
    file.write_text('{"prompt": "copy KTAB:", "response": "KTAB"}\n{"text": "some words"}\n')
    return str(file)


def test_beside_suites_and_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "copy.jsonl"
    suite.write_text(json.dumps({"prompt": "copy ABC:", "answer": "ABC"}) + "\n")
    out = tmp_path / "both"
    words = ["--suite", str(suite), "--max-tokens", "6", "--drift", text, "--base", TINY, "--out", str(out)]
    assert cli.main(["eval", TINY, *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((out / "results.json").read_text())
    assert answer["drift"]["forward_kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert answer["drift"]["base"]["fingerprint"] == answer["model"]["fingerprint"]
    assert list(answer["suites"]) == ["copy"]
    assert cli.main(["eval", TINY, "--drift", text, "--out", str(tmp_path / "alone")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"held-out text: perplexity [\d.]+, entropy [\d.]+ nats, calibration error 0\.\d+, over \d+ tokens",
        said,
    )
    assert "KL(" not in said
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert (alone["suites"], alone["drift"]["base"], alone["drift"]["forward_kl"]) == ({}, None, None)
    assert alone["drift"]["model"]["nll"] == answer["drift"]["model"]["nll"]
    folder = f"a={tmp_path / 'alone'}"
    assert cli.main(["compare", folder, "--out", str(tmp_path / "comparison")]) == 0
    assert "| a | – | – |" in capsys.readouterr().out


def test_read_later_the_drift_is_set_beside_the_suites(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "copy.jsonl", tmp_path / "out"
    suite.write_text(json.dumps({"prompt": "copy ABC:", "answer": "ABC"}) + "\n")
    assert cli.main(["eval", TINY, "--suite", str(suite), "--max-tokens", "6", "--out", str(out)]) == 0
    former, answers = json.loads((out / "results.json").read_text()), (out / "samples.jsonl").read_text()
    assert cli.main(["eval", TINY, "--drift", text, "--base", TINY, "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["drift"]["forward_kl"]["value"] == 0
    assert {**found, "drift": None} == former
    assert (out / "samples.jsonl").read_text() == answers
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"prompt": "copy AB:", "answer": "AB"}) + "\n")
    assert cli.main(["eval", TINY, "--suite", str(more), "--max-tokens", "6", "--out", str(out)]) == 0
    assert "drift: KL(ref||policy)" in capsys.readouterr().out
    both = json.loads((out / "results.json").read_text())
    assert (list(both["suites"]), both["drift"]) == (["copy", "more"], found["drift"])
    assert cli.main(["eval", TINY, "--drift", text, "--out", str(out)]) == 0
    both, answers = json.loads((out / "results.json").read_text()), (out / "samples.jsonl").read_text()
    assert (list(both["suites"]), both["drift"]["base"]) == (["copy", "more"], None)
    capsys.readouterr()
    whole = (out / "results.json").read_text()
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    (other / "more.json").write_text("{}")
    assert cli.main(["eval", str(other), "--drift", text, "--out", str(out)]) == 2
    assert f"{out} holds the result of another model ({TINY}): give another --out" in capsys.readouterr().err
    assert ((out / "results.json").read_text(), (out / "samples.jsonl").read_text()) == (whole, answers)
    (out / "results.json").unlink()
    assert cli.main(["eval", TINY, "--drift", text, "--out", str(out)]) == 2
    assert "holds answers of an evaluation that is not finished" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_text() == answers


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--base", TINY, "--suite", "x"], r"--base is for the drift from it, which needs text: give --drift TEXT"),
        (["--drift", "/nowhere.txt"], r"/nowhere\.txt cannot be read as text \(.*\): give a text or JSON Lines file"),
        (["--drift", "{text}", "--base", "/nowhere"], r"there is no model directory /nowhere: check the path"),
        (["--drift", "{text}", "--base", "{bare}"], r"config\.json says no max_position_embeddings"),
        ([], r"asft eval needs MODEL_DIR --suite SUITES \(or --drift TEXT\) --out DIR"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_sentence(
    words: list[str], says: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(TINY, bare)
    (bare / "config.json").write_text("{}")
    given = [word.format(text=text, bare=bare) for word in words]
    assert cli.main(["eval", TINY, *given, "--out", str(tmp_path / "out")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(says, sentence), sentence
