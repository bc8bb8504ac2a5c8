"""Comparisons: what is the same differs by nothing, what was drawn twice is alike, and what was measured otherwise is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.answers import read_answers
from asft_eval.compare import MEAN, Comparison, compare
from asft_eval.drift_figures import drift_table, forward_kls
from asft_eval.protocols import protocols
from asft_eval.requests import parts_of, requests_of
from asft_eval.result import Result, each_sample, read_result, write_result
from asft_eval.scoring import figures
from asft_eval.suites import suite_from_pairs
from asft_eval.told import MOST, told
from asft_eval.types import Completion, Suite

SUITES = [
    suite_from_pairs(name, [(f"{name} {i}", str(i)) for i in range(n)])
    for name, n in (("one", 40), ("two", 30))
]
Verdict = Callable[[str, int], bool]


def write(
    folder: Path, verdict: Verdict, *, suites: list[Suite] = SUITES, protocol: str = "greedy", seed: int = 0,
    words: str = "", drift: dict[str, Any] | None = None, max_tokens: int = 8,
) -> Path:  # fmt: skip
    """A finished evaluation whose completions are right as `verdict(example, sample)` says."""
    found: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    for part in parts_of(suites, protocols(protocol, max_tokens=max_tokens, seed=seed)):
        prompts = [words + example.prompt for example in part.suite.examples]
        rows: list[dict[str, Any]] = []
        for request in requests_of(part, prompts, model="m", backend="fake"):
            right = verdict(f"{part.suite.name} {request.example.id}", request.sample)
            row = request.row(Completion("yes" if right else "no", 1, True), 0.0)
            rows.append({**row, "parsed": "", "correct": right, "reason": "made up"})
        found[part.name] = figures(part, rows, backend="fake")
        samples += rows
    model = {"path": folder.name, "fingerprint": folder.name}
    result = Result(
        model=model, backend="fake", protocol=protocol, seed=seed, versions={}, suites=found, drift=drift
    )
    write_result(folder, result, samples)
    return folder


def by_luck(name: str, share: float = 0.5) -> Verdict:
    luck = random.Random(name)
    return lambda example, sample: luck.random() < share


def test_a_deterministic_result_differs_by_exactly_nothing_from_itself(tmp_path: Path):
    same = write(tmp_path / "a", by_luck("a"))
    found = compare({"a": same, "again": same})
    assert found.differences
    for one in found.differences.values():
        assert (one.value, one.low, one.high, one.p, one.p_adjusted, one.mark) == (
            0.0,
            0.0,
            0.0,
            1.0,
            1.0,
            "",
        )
    assert {(change.gained, change.lost) for change in found.changes.values()} == {(0, 0)}
    assert told(found, {"a": same, "again": same}) == []


def test_two_samplings_of_one_model_may_be_compared(tmp_path: Path):
    first = write(tmp_path / "a", by_luck("a"), protocol="paper", seed=1)
    found = compare({"a": first, "b": write(tmp_path / "b", by_luck("b"), protocol="paper", seed=2)})
    assert found.warnings == ()
    assert found.columns == ("one@paper", "two@paper", f"{MEAN} @paper")
    assert not any(one.significant for one in found.differences.values())


def test_protocols_are_not_mixed_in_a_mean(tmp_path: Path):
    found = compare({"a": write(tmp_path / "a", by_luck("a"), protocol="both")})
    assert found.means == {MEAN: ("one", "two"), f"{MEAN} @paper": ("one@paper", "two@paper")}
    mean = (found.scores["a", "one"].value + found.scores["a", "two"].value) / 2
    assert found.scores["a", MEAN].value == pytest.approx(mean)
    assert not found.differences


def test_scores_are_those_of_the_results(tmp_path: Path):
    for protocol in ("greedy", "pass@4"):
        folder = write(tmp_path / protocol, by_luck("a", 0.2), protocol=protocol)
        found = compare({"a": folder})
        for suite, result in read_result(folder).suites.items():
            score = found.scores["a", suite]
            assert score.value == pytest.approx(result.accuracy)
            assert score.low < result.accuracy < score.high


def test_all_right_is_not_certain(tmp_path: Path):
    found = compare({"a": write(tmp_path / "a", lambda *_: True)})
    score = found.scores["a", "one"]
    assert (score.value, score.high) == (1.0, 1.0)
    assert 0.9 < score.low < 0.95  # Wilson's for 40 of 40: 0.912


def test_many_models_make_many_tests_and_holm_counts_them(tmp_path: Path):
    results = {name: write(tmp_path / name, by_luck(name)) for name in "abcdefgh"}
    found = compare(results)
    raw = sorted(one.p for key, one in found.differences.items() if key[1] != MEAN)
    assert len(raw) == 14
    smallest = min(one.p_adjusted for key, one in found.differences.items() if key[1] != MEAN)
    assert smallest == pytest.approx(min(1.0, 14 * raw[0]))


def test_examples_gained_and_lost_are_told(tmp_path: Path):
    results = {
        "base": write(tmp_path / "base", lambda example, sample: sample % 2 == 0, protocol="paper"),
        "tuned": write(tmp_path / "tuned", lambda example, sample: "1" in example, protocol="paper"),
    }
    found = compare(results)
    examples = told(found, results)
    assert [one.difference for one in examples if one.suite == "one@paper"] == [0.5] * MOST + [-0.5] * MOST
    for one in examples:
        assert one.own.correct == ("1" in one.id) == (not one.first.correct)
    assert found.changes["tuned", "one@paper"].gained == sum("1" in str(i) for i in range(1, 41))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 9}, "different protocols"),
        ({"protocol": "pass@2"}, "no suite in common"),
        ({"suites": [replace(suite, version="9") for suite in SUITES]}, r"different versions of suite one \(9, "),
        ({"suites": [replace(suite, prompt="chat") for suite in SUITES]}, r"different prompts of suite one \(chat, raw\)"),
        ({"suites": [replace(suite, grader="math") for suite in SUITES]}, r"different graders of suite one \(math, "),
        ({"suites": [suite.first(7) for suite in SUITES]}, "different examples in suite one"),
        ({"words": "<|im_start|>"}, r"suite one in other words \(another chat template\)"),
    ],
)  # fmt: skip
def test_what_was_not_measured_alike_is_named(tmp_path: Path, change: dict[str, Any], says: str):
    both = {"a": write(tmp_path / "a", by_luck("a")), "b": write(tmp_path / "b", by_luck("b"), **change)}
    with pytest.raises(EvaluationError, match=says):
        compare(both)
    if "common" in says:
        return
    forced = compare(both, force=True)
    assert says.split(r" \(")[0] in "; ".join(forced.warnings)
    assert forced.differences["b", "one"].n == (7 if "examples in" in says else 40)


def drift(kl: float | None, *, text: str = "t", base: str = "base") -> dict[str, Any]:
    interval = None if kl is None else {"value": kl, "low": kl, "high": kl}
    model = {"nll": {"value": 1.0, "low": 1.0, "high": 1.0}, "perplexity": 2.7, "calibration": {"ece": 0.1}}
    model["entropy"] = model["nll"]
    return {
        "text": {"sha256": text},
        "base": None if kl is None else {"fingerprint": base},
        "forward_kl": interval,
        "reverse_kl": interval,
        "model": model,
    }


def test_drifts_of_other_texts_or_bases_are_refused(tmp_path: Path):
    def folders(**change: Any) -> dict[str, Path]:
        first = write(tmp_path / "base", by_luck("a"), drift=drift(0.0))
        return {"a": first, "b": write(tmp_path / "b", by_luck("b"), drift=drift(0.2, **change))}

    assert compare(folders()).warnings == ()
    for change, says in (({"text": "u"}, "different texts"), ({"base": "other"}, "different bases")):
        with pytest.raises(EvaluationError, match=says):
            compare(folders(**change))
        assert says in compare(folders(**change), force=True).warnings[0]


def test_the_base_has_no_drift_though_nobody_measured_it(tmp_path: Path):
    results = {
        "base": write(tmp_path / "base", by_luck("a")),
        "tuned": write(tmp_path / "tuned", by_luck("b"), drift=drift(0.2)),
    }
    found: Comparison = compare(results)
    assert {name: one.value for name, one in forward_kls(found.results).items()} == {
        "base": 0.0,
        "tuned": 0.2,
    }
    table = drift_table(found.results)
    assert table is not None
    assert table[1] == [
        ["tuned", "0.2 [0.2, 0.2]", "0.2 [0.2, 0.2]", "1 [1, 1]", "1 [1, 1]", "2.70", "0.100"]
    ]


@pytest.mark.parametrize("damage", ["lost", "twice", "torn", "ungraded", "foreign", "gone"])
def test_samples_that_are_not_whole_are_refused(tmp_path: Path, damage: str):
    folder = write(tmp_path / "a", by_luck("a"))
    file = folder / "samples.jsonl"
    lines = file.read_text().splitlines()
    damaged = {
        "lost": lines[:-1],
        "twice": [*lines, lines[-1]],
        "torn": [*lines[:-1], lines[-1][:20]],
        "ungraded": [
            json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "correct"}),
            *lines[1:],
        ],
        "foreign": [*lines[:-1], lines[-1].replace('"two"', '"three"')],
        "gone": None,
    }[damage]
    file.write_text("\n".join(damaged) + "\n") if damaged else file.unlink()
    with pytest.raises(EvaluationError, match="evaluate"):
        compare({"a": folder})


def test_separators_within_a_completion_do_not_end_a_line(tmp_path: Path):
    folder = write(tmp_path / "a", by_luck("a"))
    file = folder / "samples.jsonl"
    file.write_text(file.read_text().replace('"no"', '"n\u2028o\x85"'))
    assert sum(sample["completion"] == "n\u2028o\x85" for sample in each_sample(folder)) > 5
    assert read_answers(folder, read_result(folder)).scores["one"]
