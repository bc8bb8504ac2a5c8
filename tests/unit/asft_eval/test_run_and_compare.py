"""evaluate() from suites to results.json, and results side by side, on the fake backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.backends.fake import FakeBackend
from asft_eval.compare import Change, compare, markdown_table
from asft_eval.result import Result, fingerprint, read_result, read_samples
from asft_eval.run import evaluate
from asft_eval.statistics import standard_error, wilson_interval
from asft_eval.suites import suite_from_pairs

WORDS = suite_from_pairs("words", [(w, w.upper()) for w in ("ab", "cd", "ef", "gh")])
SUMS = suite_from_pairs("sums", [("1+1", "2"), ("2+2", "4")])


def run(model: Path, out: Path, answers: dict[str, str], **changes: object) -> Result:
    settings = {"out_dir": out, "max_tokens": 8, **changes}
    return evaluate(model, [WORDS, SUMS], backend=FakeBackend(lambda p: answers.get(p, "")), **settings)  # type: ignore[arg-type]


def test_figures_files_and_reading_back(model: Path, tmp_path: Path):
    answers = {"ab": "AB", "cd": "CD", "ef": "EF", "gh": "way too long an answer", "1+1": "3"}
    result = run(model, tmp_path / "out", answers)
    words = result.suites["words"]
    assert (words.n, words.right, words.accuracy, words.cut) == (4, 3, 0.75, 1)
    assert words.tokens == 2 + 2 + 2 + 8
    assert words.stderr == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert words.interval[0] < 0.75 < words.interval[1]
    assert result.suites["sums"].accuracy == 0
    assert read_result(tmp_path / "out") == result
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["schema_version"] == 4
    assert written["protocol"] == "greedy"
    assert written["suites"]["words"]["protocol"]["max_tokens"] == 8
    samples = read_samples(tmp_path / "out")
    assert [x["correct"] for x in samples] == [True, True, True, False, False, False]
    assert samples[5]["reason"] == "empty completion"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]


def test_limit_asks_no_more(model: Path, tmp_path: Path):
    backend = FakeBackend(lambda prompt: prompt)
    evaluate(model, [WORDS], backend=backend, out_dir=tmp_path / "o", max_tokens=8, limit=3)
    assert backend.asked == ["ab", "cd", "ef"]


@pytest.mark.parametrize("name", ["max_tokens", "limit"])
def test_numbers_below_one(model: Path, tmp_path: Path, name: str):
    with pytest.raises(EvaluationError, match=name):
        run(model, tmp_path / "o", {}, **{name: 0})
    assert not (tmp_path / "o").exists()


def test_suites_must_differ_in_name(model: Path, tmp_path: Path):
    for suites in ([], [WORDS, WORDS]):
        with pytest.raises(EvaluationError, match="at least one"):
            evaluate(model, suites, backend="hf", out_dir=tmp_path / "o", max_tokens=8)


def test_unknown_backend(model: Path, tmp_path: Path):
    with pytest.raises(EvaluationError, match="choose one of hf"):
        evaluate(model, [WORDS], backend="hff", out_dir=tmp_path / "o", max_tokens=8)


def test_fingerprint_sees_a_changed_byte_of_a_large_file(model: Path):
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    before = fingerprint(model)
    assert fingerprint(model) == before
    weights.write_bytes(bytes((5 << 20) - 1) + b"x")
    assert fingerprint(model) != before


def test_gained_and_lost_and_the_table(model: Path, tmp_path: Path):
    run(model, tmp_path / "base", {"ab": "AB", "cd": "CD", "1+1": "2"})
    run(model, tmp_path / "tuned", {"cd": "CD", "ef": "EF", "gh": "GH"})
    both = compare({"base": tmp_path / "base", "tuned": tmp_path / "tuned"})
    assert both.suites == ("words", "sums")
    assert not both.warnings
    assert both.changes["tuned", "words"] == Change(gained=2, lost=1)
    assert both.changes["tuned", "sums"] == Change(gained=0, lost=1)
    assert both.changes["base", "words"] == Change(gained=0, lost=0)
    header, rows = both.table()
    assert header == ["model", "words", "sums", "mean of suites"]
    assert rows[1][0] == "tuned"
    assert rows[1][1].startswith("75.0 [")
    assert markdown_table(header, rows).splitlines()[1] == "| --- | --- | --- | --- |"


def test_what_was_measured_differently_is_not_compared(model: Path, tmp_path: Path):
    run(model, tmp_path / "a", {})
    run(model, tmp_path / "b", {}, max_tokens=9)
    run(model, tmp_path / "c", {}, limit=1)
    for other, says in (("b", "different protocols"), ("c", "different examples in suite words")):
        with pytest.raises(EvaluationError, match=says):
            compare({"a": tmp_path / "a", other: tmp_path / other})
        assert says in compare({"a": tmp_path / "a", other: tmp_path / other}, force=True).warnings[0]


def test_damaged_or_missing_results(model: Path, tmp_path: Path):
    with pytest.raises(EvaluationError, match="evaluate a model with this"):
        compare({"a": tmp_path})
    run(model, tmp_path / "a", {})
    file = tmp_path / "a" / "results.json"
    whole = file.read_text()
    file.write_text(whole[:-40])
    with pytest.raises(EvaluationError, match="damaged"):
        read_result(tmp_path / "a")
    file.write_text(whole.replace('"schema_version": 4', '"schema_version": 99'))
    with pytest.raises(EvaluationError, match="schema version 99"):
        read_result(tmp_path / "a")


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published(right: int, n: int, low: float, high: float):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=6e-5)


def test_standard_error():
    assert standard_error(5, 10) == pytest.approx(0.1581, abs=1e-4)
    assert standard_error(10, 10) == 0
