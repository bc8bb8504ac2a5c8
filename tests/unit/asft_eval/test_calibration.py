"""Calibration of multiple choice: how sure of the letter, how often right; in results.json and in the three files of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from asft_eval.backends import Done, ignore
from asft_eval.backends.fake import FakeBackend
from asft_eval.calibration import calibration, of_choices
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Example, Suite

from asft_nemo import cli

# Log probabilities among all tokens: the letters have a part of it.
ROWS = [
    ([-3.0, -1.0, -2.5, -4.0], "B"),
    ([-0.1, -9.0, -9.0, -9.0], "C"),
    ([-1.0, -1.0, -1.0, -1.0], "A"),
    ([-8.0, -8.5, -7.9, -20.0], "C"),
]
LETTERS = Suite(
    "letters", "1", "choice", tuple(Example(str(i), str(i), row[1]) for i, row in enumerate(ROWS)), (" A", " B", " C", " D")
)  # fmt: skip


class Chooses(FakeBackend):
    """Gives the log probabilities of `ROWS`."""

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """One row a prompt."""
        del choices
        for place, prompt in enumerate(prompts):
            done(place, ROWS[int(prompt)][0])
        return [row for row, _ in ROWS]


def expected() -> float:
    """Of each example alone: all four confidences fall into different bins."""
    gaps: list[float] = []
    bins: set[int] = set()
    for row, answer in ROWS:
        shares = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        chosen = shares.index(max(shares))
        bins.add(int(10 * shares[chosen]))
        gaps.append(abs(max(shares) - ("ABCD"[chosen] == answer)))
    assert len(bins) == len(ROWS)
    return sum(gaps) / len(gaps)


def test_the_figures_are_those_of_the_definition(model: Path, tmp_path: Path) -> None:
    words = suite_from_pairs("words", [("ab", "AB")])
    settings: dict[str, Any] = {"backend": Chooses(str.upper), "max_tokens": 8, "out_dir": tmp_path / "out"}
    found = evaluate(model, [LETTERS, words], **settings)
    assert found.suites["words"].calibration is None
    written = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["letters"]["calibration"]
    assert written["ece"] == pytest.approx(expected(), abs=1e-12)
    assert [one["examples"] for one in written["bins"]] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]


def test_a_letter_is_never_surer_than_one_nor_less_than_a_quarter() -> None:
    nothing, sure = [-math.inf] * 4, [0.0, -math.inf, -math.inf, -math.inf]
    found = of_choices([{"logprobs": nothing, "correct": False}, {"logprobs": sure, "correct": True}])
    assert found["ece"] == pytest.approx(0.125)
    assert found["bins"][2]["confidence"] == 0.25
    assert found["bins"][9]["accuracy"] == 1


def test_sure_and_right_alike_is_no_error() -> None:
    assert calibration([0.75] * 4, [1, 1, 1, 0])["ece"] == 0
    assert calibration([0.75] * 4, [0, 0, 0, 0])["ece"] == 0.75


def test_a_comparison_shows_it(
    model: Path, tmp_path: Path, keep_logging_and_warnings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(model, [LETTERS], backend=Chooses(str.upper), max_tokens=8, out_dir=tmp_path / "a")
    old = json.loads((tmp_path / "a" / "results.json").read_text())
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text((tmp_path / "a" / "samples.jsonl").read_text())
    (tmp_path / "b" / "results.json").write_text(json.dumps(old))
    del old["suites"]["letters"]["calibration"]
    (tmp_path / "c" / "results.json").write_text(json.dumps({**old, "schema_version": 3}))
    results = [f"{name}={tmp_path / name}" for name in "abc"]
    assert cli.main(["compare", *results, "--out", str(tmp_path / "out")]) == 0
    ece = f"{expected():.3f}"
    assert f"| a | {ece} |\n| b | {ece} |\n| c | – |" in (tmp_path / "out" / "comparison.md").read_text()
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert values["calibration"] == [
        {"model": name, "suite": "letters", "ece": pytest.approx(expected())} for name in "ab"
    ]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert f"<td>{ece}</td><td>{ece}</td><td>–</td>" in page
    capsys.readouterr()
