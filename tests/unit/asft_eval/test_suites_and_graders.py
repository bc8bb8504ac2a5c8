"""Suites from JSON lines, their hashes and their errors; exact match."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from asft_eval import EvaluationError, Suite
from asft_eval.graders import grader
from asft_eval.suites import load_jsonl, load_suites, suite_from_pairs, write_jsonl
from asft_eval.suites.questions import asked_by
from hypothesis import given
from hypothesis import strategies as st


def test_a_suite_survives_its_file(tmp_path: Path):
    suite = suite_from_pairs("sums", [("1+1:", "2"), ("line\nbreak ä", " padded")])
    write_jsonl(tmp_path / "sums.jsonl", suite)
    assert load_jsonl(tmp_path / "sums.jsonl") == suite
    assert load_jsonl(tmp_path / "sums.jsonl").sha256 == suite.sha256


def test_field_names_and_line_numbers_as_ids(tmp_path: Path):
    file = tmp_path / "math.jsonl"
    file.write_text('{"question": "1+1", "answer": 2}\n\n{"question": "2+2", "answer": 4}\n')
    suite = load_jsonl(file, prompt_field="question")
    assert [(e.id, e.prompt, e.answer) for e in suite.examples] == [("1", "1+1", "2"), ("3", "2+2", "4")]


@pytest.mark.parametrize(
    "change", [{"name": "b"}, {"version": "2"}, {"grader": "other"}, {"examples": (("x", "y"),)}]
)
def test_the_hash_sees_every_part(change: dict[str, object]):
    pairs = change.pop("examples", (("x", "z"),))
    given_parts = {"name": "a", "version": "1", "grader": "exact_match", **change}
    changed = suite_from_pairs(str(given_parts.pop("name")), pairs, **given_parts)  # type: ignore[arg-type]
    assert changed.sha256 != suite_from_pairs("a", (("x", "z"),)).sha256


def test_a_limited_suite_has_another_hash():
    suite = suite_from_pairs("a", [("x", "1"), ("y", "2")])
    assert suite.first(1).examples == suite.examples[:1]
    assert suite.first(1).sha256 != suite.sha256 == suite.first(None).sha256


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "a", "answer": "b"}\nnonsense\n[1]\n{"prompt": "a"}\n', "3 bad line.*line 2"),
        ('{"prompt": "a", "answer": " "}\n', "'answer' is missing or empty"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "is it?", "answer": true}', "line 2: field 'answer' is true, neither a text nor a number .*quotes"),
        ('{"prompt": false, "answer": "b"}', "line 1: field 'prompt' is false, neither"),
        ("\n", "no example"),
        ('{"id": 7, "prompt": "a", "answer": "b"}\n' * 2, "id 7 in lines 1 and 2: make ids unique"),
        ('{"id": [7], "prompt": "a", "answer": "b"}\n', "line 1: the id is neither a text nor a number"),
        ("[" * 100_000, "line 1: nested too deeply: correct the file"),
        ('{"prompt": "\\ud800", "answer": "b"}', r"line 1: \\ud800 is half of a surrogate pair"),
        ('{"prompt": "a", "answer": "b\\uDFFF"}', r"line 1: \\udfff is half of a surrogate pair"),
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xe4"', "as text .line 2 is not UTF-8: byte 0xe4.: give JSON"),
        ('{"prompt": "a", "answer": "b"}'.encode("utf-16"), "as text .line 1 is not UTF-8"),
        (gzip.compress(b"x" * 99)[:-9], "as text .damaged gzip"),
        ('{"prompt": "a", "answer": "b", "grader": "code"}', "the grader is 'code', .* may be exact_match or math"),
        ('{"prompt": "a", "answer": "b", "grader": "math"}\n{"prompt": "a", "answer": "b"}', "grader math in line 1 and .none. in line 2"),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, content: str | bytes, says: str):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=says):
        load_jsonl(file)


ROW = '{"prompt": "a", "answer": "b", "id": null}\n'


@pytest.mark.parametrize(
    "content",
    [("\ufeff" + ROW).encode(), gzip.compress(ROW.encode()), ROW.replace("\n", "\r\n").encode()],
    ids=["byte order mark", "gzip", "other line ends"],
)
def test_forms_of_one_file(tmp_path: Path, content: bytes):
    (tmp_path / "plain.jsonl").write_text(ROW)
    file = tmp_path / "plain.jsonl.gz"
    file.write_bytes(content)
    assert load_jsonl(file) == load_jsonl(tmp_path / "plain.jsonl")
    assert [(e.id, e.prompt, e.answer) for e in load_jsonl(file).examples] == [("1", "a", "b")]
    assert asked_by([str(file)]) == {str(file): ["a"]}


def test_a_file_names_its_grader(tmp_path: Path):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "1/2 of 1?", "answer": "0.5", "grader": "math"}\n')
    (suite,) = load_suites([f" {file} "])
    assert suite.grader == "math"
    (tmp_path / "again").mkdir()
    write_jsonl(tmp_path / "again" / "sums.jsonl", suite)
    assert load_jsonl(tmp_path / "again" / "sums.jsonl") == suite
    assert load_jsonl(file, grader="exact_match").grader == "exact_match"


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(EvaluationError, match="check the path"):
        load_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("42", "42", True),
        (" 42\n", "42", True),
        ("42.", "42", False),
        ("", "42", False),
        ("abc", "ABC", False),
    ],
)
def test_exact_match(completion: str, answer: str, correct: bool):
    assert grader("exact_match")(completion, answer).correct is correct


@given(st.text(min_size=1).filter(str.strip))
def test_every_answer_matches_itself(text: str):
    assert grader("exact_match")(text, text).correct


def test_an_unknown_grader_lists_the_known():
    with pytest.raises(EvaluationError, match="exact_match"):
        grader("exakt")


def test_suites_are_values():
    assert suite_from_pairs("a", [("x", "1")]) == suite_from_pairs("a", [("x", "1")])
    assert isinstance(hash(suite_from_pairs("a", [("x", "1")])), int)
    assert isinstance(suite_from_pairs("a", [("x", "1")]), Suite)
