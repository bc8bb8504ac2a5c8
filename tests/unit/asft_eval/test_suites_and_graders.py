"""Suites from JSON lines, their hashes and their errors; exact match."""

from __future__ import annotations

from pathlib import Path

import pytest
from asft_eval import EvaluationError, Suite
from asft_eval.graders import grader
from asft_eval.suites import load_jsonl, suite_from_pairs, write_jsonl
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
        ("\n", "no example"),
        ('{"id": 7, "prompt": "a", "answer": "b"}\n' * 2, "id 7 in lines 1 and 2: make ids unique"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, says: str):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(EvaluationError, match=says):
        load_jsonl(file)


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
