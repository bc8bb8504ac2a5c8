"""A folder gathers what was measured of one model: what is not asked for again stays, whatever happens to the rest."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.backends.fake import FakeBackend
from asft_eval.compare import compare
from asft_eval.result import Result, read_result, read_samples, write_result
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Example, Suite

WORDS = suite_from_pairs("words", [(word, word.upper()) for word in ("ab", "cd", "ef")])
SUMS = suite_from_pairs("sums", [("1+1", "2"), ("2+2", "4")])
DRIFT = {"text": {"sha256": "t"}, "base": None, "forward_kl": None}


def run(model: Path, out: Path, *suites: Suite, **changes: Any) -> Result:
    settings: dict[str, Any] = {"backend": FakeBackend(str.upper), "max_tokens": 8, **changes}
    return evaluate(model, suites, out_dir=out, **settings)


def with_drift(out: Path, result: Result) -> None:
    write_result(out, replace(result, drift=DRIFT, versions={"old": "1"}), read_samples(out))


def test_suites_and_drift_stay_where_others_are_asked_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with_drift(out, run(model, out, WORDS))
    words = read_samples(out)
    found = run(model, out, SUMS)
    assert list(found.suites) == ["words", "sums"]
    assert (found.drift, found.versions["old"]) == (DRIFT, "1")
    assert read_samples(out)[:3] == words
    assert read_result(out) == found
    assert compare({"a": out}).suites == ("words", "sums")
    again = FakeBackend(str.upper)
    found = run(model, out, WORDS, backend=again, max_tokens=9, protocol="both")
    assert list(found.suites) == ["sums", "words", "words@paper"]
    assert [one.protocol.max_tokens for one in found.suites.values()] == [8, 9, 9]
    assert len(again.asked) == 3 + 48
    assert len(read_samples(out)) == 2 + 3 + 48


def test_suites_of_another_backend_say_so(model: Path, tmp_path: Path) -> None:
    other = FakeBackend(str.upper)
    other.name = "other"
    run(model, tmp_path, WORDS)
    found = run(model, tmp_path, SUMS, backend=other)
    assert {name: one.backend for name, one in found.suites.items()} == {"words": "fake", "sums": "other"}


class Interrupted(Exception):
    """Stands for the machine going down."""


def test_what_stays_survives_an_evaluation_that_is_cut_off(model: Path, tmp_path: Path) -> None:
    def dies(prompt: str) -> str:
        if prompt == "2+2":
            raise Interrupted
        return prompt

    out = tmp_path / "out"
    with_drift(out, run(model, out, WORDS))
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(model, out, SUMS, backend=FakeBackend(dies))
        assert list(read_result(out).suites) == ["words"]
        with pytest.raises(
            EvaluationError, match="not finished: evaluate with this directory as --out again"
        ):
            compare({"a": out})
    last = FakeBackend(str.upper)
    found = run(model, out, SUMS, backend=last)
    assert last.asked == ["2+2"]
    assert (list(found.suites), found.drift) == (["words", "sums"], DRIFT)
    assert found.suites["words"].right == 3


def test_a_suite_whose_answers_are_lost_is_left_out_and_it_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, tmp_path / "out", WORDS)
    file = tmp_path / "out" / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        found = run(model, tmp_path / "out", SUMS)
    assert list(found.suites) == ["sums"]
    assert "words: measured before, but" in caplog.text
    assert compare({"a": tmp_path / "out"}).suites == ("sums",)


def test_another_models_result_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(model, out, WORDS)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other.mkdir()
    (other / "config.json").write_text('{"other": 1}')
    asked = FakeBackend(str.upper)
    with pytest.raises(EvaluationError, match=r"holds the result of another model \(.*model\): give another"):
        run(other, out, SUMS, backend=asked)
    assert asked.asked == []
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (model / "config.json").write_text('{"trained": "anew"}')
    assert list(run(model, out, SUMS).suites) == ["sums"], "its own directory holds another model now"


def test_answers_that_await_a_judge_stay(model: Path, tmp_path: Path) -> None:
    duel = Suite("duel", "1", "judge", (Example("set/1", "say", "reference", "say"),))
    run(model, tmp_path, duel)
    found = run(model, tmp_path, WORDS)
    assert (list(found.suites), list(found.for_judge)) == (["words"], ["duel"])
    assert [row["correct"] for row in read_samples(tmp_path)] == [None, True, True, True]


def test_results_of_schema_version_3_are_read_and_stay(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, WORDS)
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    content["schema_version"] = 3
    for key in ("backend", "calibration"):
        del content["suites"]["words"][key]
    file.write_text(json.dumps(content))
    found = run(model, tmp_path, SUMS)
    assert (found.suites["words"].backend, found.suites["words"].calibration) == ("fake", None)
    assert json.loads(file.read_text())["schema_version"] == 4
