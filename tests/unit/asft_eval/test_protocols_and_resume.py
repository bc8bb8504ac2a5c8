"""Protocols and their scores; evaluations that were cut off; explanations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import Options
from asft_eval.backends.fake import FakeBackend
from asft_eval.explain import explain
from asft_eval.protocols import pass_at_k, protocols
from asft_eval.result import Result, read_samples
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs

WORDS = suite_from_pairs("words", [(word, word.upper()) for word in ("ab", "cd", "ef")])


def run(model: Path, out: Path, backend: FakeBackend, **changes: Any) -> Result:
    return evaluate(model, [WORDS], **{"backend": backend, "out_dir": out, "max_tokens": 8, **changes})


def in_turn(*answers: str) -> Callable[[str], str]:
    """Answers one after the other, whatever is asked."""
    endless = itertools.cycle(answers)
    return lambda prompt: next(endless)


def test_named_protocols():
    (greedy,) = protocols("greedy")
    (paper,) = protocols("paper", seed=3)
    assert (greedy.n, greedy.temperature, greedy.max_tokens, greedy.seed) == (1, 0, 4096, None)
    assert (paper.n, paper.temperature, paper.top_p, paper.max_tokens, paper.seed) == (16, 1, 1, 4096, 3)
    assert protocols("both", max_tokens=9)[0].max_tokens == 9
    assert [one.name for one in protocols("both")] == ["greedy", "paper"]
    assert [(one.n, one.k) for one in (*protocols("pass@1"), *protocols("pass@10"))] == [(16, 1), (20, 10)]
    for name in ("pass@0", "pass@", "pass@1001", "papr", "pass@-1"):
        with pytest.raises(EvaluationError, match="choose one of greedy, paper, both, or pass@K"):
            protocols(name)


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 3, 5)])
def test_pass_at_k_counts_all_choices(n: int, right: int, k: int):
    chosen = list(itertools.combinations(range(n), k))
    expected = sum(any(i < right for i in choice) for choice in chosen) / len(chosen)
    assert pass_at_k(right, n, k) == pytest.approx(expected)


def test_paper_averages_over_all_samples(model: Path, tmp_path: Path):
    # 16 completions an example: all right, half right, none right
    backend = FakeBackend(in_turn(*["AB"] * 16, *["CD", "no"] * 8, *["no"] * 16))
    figures = run(model, tmp_path / "out", backend, protocol="paper").suites["words@paper"]
    assert (figures.n, figures.right, figures.accuracy) == (3, 24, 0.5)
    assert figures.stderr == pytest.approx((0.5 / 2 / 3) ** 0.5)  # shares 1, 1/2, 0 over three examples
    assert figures.interval[0] < 0.5 < figures.interval[1]
    assert len(set(backend.seeds)) == 48
    passed = run(
        model,
        tmp_path / "pass",
        FakeBackend(in_turn(*["AB"] * 16, *["CD", "no"] * 8, *["no"] * 16)),
        protocol="pass@1",
    )
    assert passed.suites["words@pass@1"].accuracy == pytest.approx(0.5)


def test_both_are_two_rows_of_one_result(model: Path, tmp_path: Path):
    result = run(model, tmp_path / "out", FakeBackend(str.upper), protocol="both", seed=5)
    assert list(result.suites) == ["words", "words@paper"]
    assert (result.protocol, result.seed) == ("both", 5)
    assert [x.accuracy for x in result.suites.values()] == [1, 1]
    assert len(read_samples(tmp_path / "out")) == 3 + 48


class Interrupted(Exception):
    """Stands for the machine going down."""


@pytest.mark.parametrize("damage", ["none", "half a line", "half a character", "nonsense"])
def test_an_interrupted_evaluation_asks_only_what_is_new(model: Path, tmp_path: Path, damage: str):
    def dies(prompt: str) -> str:
        if prompt == "ef":
            raise Interrupted
        return "ä" + prompt.upper()

    first = FakeBackend(dies)
    with pytest.raises(Interrupted):
        run(model, tmp_path / "out", first)
    file = tmp_path / "out" / "samples.jsonl"
    raw = file.read_bytes()
    cut = {"half a line": -30, "half a character": raw.rindex("ä".encode()) + 1 - len(raw)}
    file.write_bytes(raw[: cut[damage]] if damage in cut else raw + b"{]\n" * (damage == "nonsense"))
    again = FakeBackend(lambda prompt: "ä" + prompt.upper())
    result = run(model, tmp_path / "out", again)
    assert again.asked == (["cd", "ef"] if damage in cut else ["ef"])
    assert result.suites["words"].n == 3
    assert [x["completion"] for x in read_samples(tmp_path / "out")] == ["äAB", "äCD", "äEF"]


def test_what_changed_is_asked_again(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    run(model, out, FakeBackend(str.upper), limit=2)
    more = FakeBackend(str.upper)
    run(model, out, more)
    assert more.asked == ["ef"], "a larger limit asks the rest"
    longer = FakeBackend(str.upper)
    run(model, out, longer, max_tokens=9)
    assert longer.asked == ["ab", "cd", "ef"]
    (model / "config.json").write_text('{"other": 1}')
    other = FakeBackend(str.upper)
    run(model, out, other, max_tokens=9)
    assert other.asked == ["ab", "cd", "ef"]


def test_explanations(model: Path, tmp_path: Path):
    run(model, tmp_path / "out", FakeBackend(lambda prompt: "AB"))
    words = explain(tmp_path / "out", "words:2")
    for part in (
        "words, example 2",
        "right answer: CD",
        "completion 1: wrong",
        "read as the answer: AB",
        "why: different",
    ):
        assert part in words
    with pytest.raises(EvaluationError, match="ids look like words:1, words:2"):
        explain(tmp_path / "out", "9")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["correct"]
    (tmp_path / "out" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EvaluationError, match="not finished"):
        explain(tmp_path / "out", "2")


def test_no_model_is_loaded_where_every_answer_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []

    def open_(name: str, *_: Any) -> FakeBackend:
        opened.append(name)
        backend = FakeBackend(str.upper)
        backend.name, backend.versions = name, {"torch": "1"}
        return backend

    monkeypatch.setattr("asft_eval.backends.open_backend", open_)
    monkeypatch.setattr("asft_eval.run.require_installed", lambda *_: None)

    def again(**changes: Any) -> Result:
        return evaluate(
            model, [WORDS], **{"backend": "hf", "out_dir": tmp_path / "out", "max_tokens": 8, **changes}
        )

    first = again()
    samples = read_samples(tmp_path / "out")
    assert again() == first
    assert (opened, read_samples(tmp_path / "out")) == (["hf"], samples)
    again(limit=2)
    assert len(opened) == 1, "a part of what is there"
    again()
    assert len(opened) == 1, "what the limit left out was not forgotten"
    for changes in ({"backend": "vllm"}, {"backend": "vllm", "max_tokens": 2}):
        again(**changes)
    assert opened == ["hf", "vllm", "vllm"]
    (model / "config.json").write_text('{"other": 1}')
    again(backend="vllm", max_tokens=2)
    assert len(opened) == 4, "another model"
    with pytest.raises(EvaluationError, match="says nothing to the backend vllm"):
        again(backend="vllm", max_tokens=2, options=Options(base_url="http://nowhere"))
