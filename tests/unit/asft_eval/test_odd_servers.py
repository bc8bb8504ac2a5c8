"""Servers that answer otherwise than OpenAI's protocol says: one sentence each, what was answered before is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from asft_eval.backends.server import KEY_VARIABLE, URL_VARIABLE
from openai_server import MODEL, FakeServer, serving

from asft_nemo import cli

KEY = "sk-secret-4711"
Change = Callable[[dict[str, Any]], Any]

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with serving() as running:
        yield running


def first(**changes: Any) -> Change:
    """The answer with some of its choice's values others."""
    return lambda proper: {**proper, "choices": [{**proper["choices"][0], **changes}]}


def instead(**changes: Any) -> Change:
    return lambda proper: {**proper, **changes}


def words_of(tmp_path: Path, server: FakeServer, *more: str) -> list[str]:
    suite = tmp_path / "words.jsonl"
    rows = ({"prompt": word, "answer": word.upper()} for word in ("ab", "cd", "ef"))
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--max-tokens", "8", "--out", str(tmp_path / "out"), "--base-url", server.url]
    return ["eval", MODEL, "--suite", str(suite), "--backend", "openai", "--batch-size", "1", *out, *more]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says last, besides those of progress."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert KEY not in said.err
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    "listing",
    [
        {"data": None},
        {"data": 7},
        {"data": [None]},
        {"data": ["upper"]},
        {"data": [{"name": MODEL}]},
        {"models": []},
    ],
)
def test_a_list_of_models_of_another_form(
    server: FakeServer, tmp_path: Path, listing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.instead = lambda path, proper: listing
    sentence = refusal(words_of(tmp_path, server), capsys)
    assert "answers otherwise than OpenAI's protocol says" in sentence
    assert "correct --base-url, or use another server" in sentence
    assert not (tmp_path / "out").exists()


ODD: Mapping[str, tuple[Change, str]] = {
    "no choice": (instead(choices=[]), "0 choices instead of 1"),
    "two choices": (lambda proper: {**proper, "choices": proper["choices"] * 2}, "2 choices instead of 1"),
    "choices null": (instead(choices=None), "answers otherwise"),
    "choices a number": (instead(choices=[3]), "answers otherwise"),
    "no choices": (lambda proper: {"usage": {}}, "KeyError: 'choices'"),
    "text null": (first(text=None), "answers otherwise"),
    "text a list": (first(text=["A"]), "answers otherwise"),
    "usage a word": (instead(usage="much"), "answers otherwise"),
    "tokens a word": (instead(usage={"completion_tokens": "much"}), "invalid literal for int"),
    "tokens endless": (instead(usage={"completion_tokens": float("inf")}), "OverflowError"),
    "an error": (lambda proper: {"error": {"message": f"no {KEY}"}}, "status 200: no ***"),
    "an error in words": (lambda proper: {"error": "overheated", "choices": None}, "status 200: overheated"),
    "a page": (lambda proper: b"<html><body>Welcome</body></html>", "status 200: <html><body>Welcome"),
    "a list": (lambda proper: [proper], "cannot answer /v1/completions"),
    "nothing": (lambda proper: b"", "cannot answer /v1/completions (status 200: no reason given)"),
    "bytes": (lambda proper: b"\xff\xfe\x00", "cannot answer /v1/completions"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_answer_is_one_sentence_and_costs_no_other(
    server: FakeServer, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = ODD[kind]
    asked: list[str] = []

    def second_is_odd(path: str, proper: dict[str, Any]) -> Any:
        asked.append(path)
        return change(proper) if asked.count("completions") == 2 else proper

    server.instead = second_is_odd
    sentence = refusal(words_of(tmp_path, server), capsys)
    assert says in sentence, sentence
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    kept = [json.loads(line)["completion"].lower() for line in lines]
    # The third may be under way when the second is read.
    before = [body["prompt"] for _, body in server.asked]
    assert sorted(kept) == sorted({*before} - {"cd"})
    assert "ab" in kept
    server.asked.clear()
    assert cli.main(words_of(tmp_path, server)) == 0
    assert {body["prompt"] for _, body in server.asked} == {"ab", "cd", "ef"} - {*kept}
    assert "100.0 % of 3 right" in capsys.readouterr().out


def test_half_a_character_is_kept_as_a_question_mark(server: FakeServer, tmp_path: Path) -> None:
    server.instead = lambda path, proper: proper if path == "models" else first(text="A\ud83d")(proper)
    assert cli.main(words_of(tmp_path, server)) == 0
    assert json.loads((tmp_path / "out" / "samples.jsonl").open().readline())["completion"] == "A?"


def test_a_chat_that_says_nothing_has_an_empty_completion(server: FakeServer, tmp_path: Path) -> None:
    silent = first(message={"content": None}, finish_reason="length")
    server.instead = lambda path, proper: proper if path == "models" else silent(proper)
    assert cli.main(words_of(tmp_path, server, "--api", "chat")) == 0
    row = json.loads((tmp_path / "out" / "samples.jsonl").open().readline())
    assert (row["completion"], row["finished"], row["reason"]) == ("", False, "empty completion")


def logprobs(**changes: Any) -> Change:
    return lambda proper: first(logprobs={**proper["choices"][0]["logprobs"], **changes})(proper)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (first(logprobs=None), "gives no log probabilities of a given text"),
        (logprobs(token_logprobs=None), "gives no log probabilities of a given text"),
        (logprobs(token_logprobs=[]), "gives no log probabilities of a given text"),
        (logprobs(token_logprobs=[None] * 99), "gives no log probabilities of a given text"),
        (logprobs(tokens=[]), "gives no log probabilities of a given text"),
        (logprobs(token_logprobs=["x"] * 99), "could not convert string to float"),
        (logprobs(token_logprobs=[float("nan")] * 99), "a log probability is no number"),
        (instead(usage=None), "answers otherwise"),
        (instead(usage={"prompt_tokens": "all"}), "invalid literal for int"),
        (instead(choices=[]), "0 choices instead of 1"),
        (first(logprobs=[1]), "answers otherwise"),
    ],
)
def test_odd_log_probabilities_are_said_before_anything_is_asked(
    server: FakeServer, tmp_path: Path, data_dir: Path, change: Change, says: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    server.instead = lambda path, proper: proper if path == "models" else change(proper)
    words = words_of(tmp_path, server, "--limit", "2")
    words[words.index("--suite") + 1] = "medqa"
    assert says in refusal(words, capsys)
    assert len(server.asked) == 1
    assert not (tmp_path / "out").exists()
