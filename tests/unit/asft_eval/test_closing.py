"""What a backend starts is ended when its last question is answered, and before a judge takes the same memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asft_eval import judge_model
from asft_eval.backends import OWN
from asft_eval.backends.hf import HfBackend
from asft_eval.run import evaluate

from asft_nemo import cli

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each opening and closing of the backend `hf`, which gets a `close` here."""
    found: list[str] = []
    begin: Callable[..., None] = HfBackend.__init__

    def opens(self: HfBackend, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        found.append("opened")

    monkeypatch.setattr(HfBackend, "__init__", opens)
    monkeypatch.setattr(HfBackend, "close", lambda _: found.append("closed"), raising=False)
    return found


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "words.jsonl"
    file.write_text(json.dumps({"prompt": "copy AB:", "answer": "AB"}) + "\n")
    return file


def test_what_an_evaluation_opened_it_closes(
    events: list[str], suite: Path, model_dir: Path, tmp_path: Path
) -> None:
    evaluate(model_dir, [suite], backend="hf", out_dir=tmp_path / "out", max_tokens=4)
    assert events == ["opened", "closed"]


def test_it_is_closed_after_a_failure_too(
    events: list[str], suite: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfBackend, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, [suite], backend="hf", out_dir=tmp_path / "out", max_tokens=4)
    assert events == ["opened", "closed"]


def test_an_open_backend_is_the_callers(
    events: list[str], suite: Path, model_dir: Path, tmp_path: Path
) -> None:
    evaluate(
        model_dir, [suite], backend=HfBackend(model_dir, batch_size=1), out_dir=tmp_path / "out", max_tokens=4
    )
    assert events == ["opened"]


def test_a_model_is_closed_before_its_judge_is_opened(
    events: list[str], data_dir: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    words = ["eval", str(model_dir), "--suite", "alpaca_eval", "--limit", "2", "--max-tokens", "2"]
    assert cli.main([*words, "--judge", str(model_dir), "--out", str(tmp_path / "out")]) == 0
    assert events == ["opened", "closed", "opened", "closed"]


def test_a_judge_that_cannot_be_read_is_closed(
    events: list[str], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge_model, "fingerprint", fails)
    with pytest.raises(KeyboardInterrupt):
        judge_model.ModelJudge(str(model_dir), backend="hf", options=OWN)
    assert events == ["opened", "closed"]
