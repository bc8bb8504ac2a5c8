"""The grader of mathematics: the regression table, real gold answers, what hangs or is huge, and how fast it is."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.graders import grade, math_pool
from asft_eval.graders.math_judge import quick, same
from asft_eval.graders.math_pool import grade_math
from asft_eval.graders.math_text import find_answer, last_boxed
from asft_eval.suites import load_suite
from asft_eval.types import Example
from math_table import TABLE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="no math-verify")


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], tuple[bool, str]]:
    pairs = [(gold, completion) for rows in TABLE.values() for gold, completion, _ in rows]
    return {
        pair: (score.correct, f"{score.reason} (read {score.parsed!r})")
        for pair, score in zip(pairs, grade_math(pairs, processes=1), strict=True)
    }


def test_the_table_is_large_and_has_no_row_twice():
    rows = [row for rows in TABLE.values() for row in rows]
    assert len(rows) >= 200
    assert len({row[:2] for row in rows}) == len(rows)
    assert sum(not right for *_, right in rows) >= 60


@pytest.mark.parametrize("kind", TABLE)
def test_the_table(kind: str, verdicts: dict[tuple[str, str], tuple[bool, str]]):
    wrong = [
        (gold, completion, right, verdicts[gold, completion][1])
        for gold, completion, right in TABLE[kind]
        if verdicts[gold, completion][0] != right
    ]
    assert wrong == []


# --- real data -----------------------------------------------------------------------------------------------


@pytest.fixture
def real(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    return data_dir


@pytest.mark.parametrize("name", ["math500", "gsm8k", "aime24"])
def test_gold_answers_against_themselves_and_shuffled(real: Path, name: str):
    golds = [example.answer for example in load_suite(name).examples]
    own = grade_math([(gold, f"So it is $\\boxed{{{gold}}}$.") for gold in golds])
    assert all(score.correct for score in own)
    stated = grade_math([(gold, f"The answer is ${gold}$.") for gold in golds])
    assert all(score.correct for score in stated)
    moved = [*golds[1:], golds[0]]
    equal = sum(a == b for a, b in zip(golds, moved, strict=True))
    # Only what takes no algebra here; the next test takes all of it.
    right = sum(bool((quick(a, b) or (False,))[0]) for a, b in zip(golds, moved, strict=True))
    assert equal <= right <= equal + 0.01 * len(golds)


@pytest.mark.long
@pytest.mark.parametrize("step", [1, 101, 250])
def test_shuffled_golds_of_math_500_with_algebra(real: Path, step: int):
    golds = [example.answer for example in load_suite("math500").examples]
    pairs = [(gold, golds[(i + step) % len(golds)]) for i, gold in enumerate(golds)]
    scores = grade_math([(gold, rf"\boxed{{{other}}}") for gold, other in pairs])
    right = [pair for pair, score in zip(pairs, scores, strict=True) if score.correct]
    equal = sum(gold == other for gold, other in pairs)
    assert equal <= len(right) <= equal + 0.01 * len(golds), right


def test_published_solutions_hold_their_answers(real: Path):
    """Every worked solution of GSM8K and MATH-500 is read and judged right."""
    import json

    for name, field in (("math/math500_test.jsonl", "solution"), ("math/gsm8k_test.jsonl", "answer")):
        rows = [json.loads(line) for line in (real / name).read_text().splitlines()]
        golds = [example.answer for example in load_suite(Path(name).name.split("_")[0]).examples]
        pairs = [(gold, row[field]) for gold, row in zip(golds, rows, strict=True)]
        assert [pair for pair, score in zip(pairs, grade_math(pairs), strict=True) if not score.correct] == []


# --- what hangs, what is huge, where it runs -----------------------------------------------------------------

TOWER = r"\boxed{9^{9^{9^{9}}}}"


def test_what_never_ends_is_stopped_and_the_rest_goes_on():
    scores = grade_math([("42", TOWER), ("x+1", r"\boxed{1+x}")], processes=1, seconds=1.0)
    assert [score.correct for score in scores] == [False, True]
    assert "not decided" in scores[0].reason


def test_the_time_limit_holds_in_daemonic_workers():
    pairs = [("42", TOWER), ("2x", r"\boxed{x+x}")]
    with get_context("spawn").Pool(1) as pool:
        scores = pool.apply_async(grade_math, (pairs,), {"processes": 1, "seconds": 1.0}).get(timeout=240)
    assert [score.correct for score in scores] == [False, True]


@pytest.mark.parametrize(
    "huge",
    ["x" * 10**6, "\\boxed{" * 150_000, "1" * 10**6, "$" * 10**6, "answer is " * 10**5, "{" * 10**6],
    ids=["letters", "boxes", "digits", "dollars", "answers", "braces"],
)
def test_a_megabyte_takes_a_moment(huge: str):
    (score,) = grade_math([("42", huge)], processes=1, seconds=1.0)
    assert not score.correct
    (score,) = grade_math([("42", huge + r" so $\boxed{42}$")], processes=1, seconds=1.0)
    assert score.correct


def test_an_interrupted_grading_begins_nothing_more(monkeypatch: pytest.MonkeyPatch):
    """Its threads would outlast Ctrl-C by as much as there was to grade."""
    from asft_eval.graders import math_pool

    asked: list[tuple[str, str]] = []

    def slow(_: math_pool._Process, pair: tuple[str, str]) -> tuple[bool, str]:
        asked.append(pair)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return True, ""

    monkeypatch.setattr(math_pool._Process, "ask", slow)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell began with `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            math_pool._compare([("1", str(number)) for number in range(500)], 1, 1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    begun = len(asked)
    time.sleep(0.3)
    assert len(asked) <= begun + 1


def test_equal_pairs_are_compared_once(monkeypatch: pytest.MonkeyPatch):
    from asft_eval.graders import math_pool

    asked: list[object] = []

    def compare(hard: list[tuple[str, str]], *_: object) -> dict[tuple[str, str], tuple[bool, str]]:
        asked.extend(hard)
        return dict.fromkeys(hard, (True, ""))

    monkeypatch.setattr(math_pool, "_compare", compare)
    grade_math([("x+1", r"\boxed{1+x}"), ("x+1", r"$\boxed{1+x}$"), ("7", r"\boxed{7.0}")])
    assert asked == [("x+1", "1+x")]


def test_without_math_verify_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install 'math-verify"):
        grade_math([("x+1", r"\boxed{1+x}")])


def test_small_parts():
    assert last_boxed(r"\boxed{\frac{1}{2}} and \boxed{3}") == r"\frac{1}{2}, 3"
    assert last_boxed("none") is None
    assert find_answer("So $5$ it is").where == "last formula"
    assert same("5", "5") == (True, "the same text")
    example = Example("1", "1+1", "2")
    assert [score.correct for score in grade("math", [(example, "#### 2"), (example, "#### 3")])] == [
        True,
        False,
    ]
    with pytest.raises(EvaluationError, match=r"choose one of .*math"):
        grade("maths", [])


def test_answers_that_no_process_compares_are_not_called_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_pool, "_MEMORY", 16 << 20)  # too little to begin with
    with pytest.raises(EvaluationError, match="do not start"):
        grade_math([("x+1", r"\boxed{1+x}")], processes=1)


def test_a_batch_systems_limit_of_memory_is_kept():
    code = (
        "from asft_eval.graders.math_pool import grade_math; import resource; "
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); "
        "print(grade_math([('x+1', r'\\boxed{1+x}')], processes=1)[0].correct)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(math_pool.__file__).parents[2]),
            "OPENBLAS_NUM_THREADS": "1",
        },
    )
    assert done.stdout.strip() == "True"
