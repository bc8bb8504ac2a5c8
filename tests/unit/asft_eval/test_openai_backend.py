"""The openai backend against a real HTTP server on this machine: what it sends, what it makes of answers, and of answers that do not come."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asft_eval import EvaluationError, Protocol
from asft_eval.backends import Options
from asft_eval.backends import server as server_module
from asft_eval.backends.openai import OpenAIBackend
from asft_eval.backends.server import KEY_VARIABLE, URL_VARIABLE
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Example, Suite
from openai_server import LOGPROB, MODEL, FakeServer, serving
from transformers import AutoTokenizer

from asft_nemo import cli

KEY = "sk-secret-0815"
GREEDY = Protocol(max_tokens=8)
WORDS = suite_from_pairs("words", [(word, word.upper()) for word in ("ab", "cd", "ef", "gh")])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with serving() as running:
        yield running


def opened(server: FakeServer, **changes: Any) -> OpenAIBackend:
    settings = {"model": MODEL, "base_url": server.url, "batch_size": 4, "first_wait": 0.01, **changes}
    return OpenAIBackend(**settings)


def test_completions_come_in_the_order_of_the_prompts(server: FakeServer):
    prompts = [f"{'x' * (i % 5)}{i}" for i in range(40)]
    told: dict[int, str] = {}
    answers = opened(server).generate(
        prompts, protocol=GREEDY, done=lambda place, answer: told.update({place: answer.text})
    )
    assert [answer.text for answer in answers] == [prompt.upper() for prompt in prompts]
    assert told == {i: prompt.upper() for i, prompt in enumerate(prompts)}
    (cut,) = opened(server).generate(["abcdefghij"], protocol=GREEDY)
    assert (cut.text, cut.num_tokens, cut.finished) == ("ABCDEFGH", 8, False)
    assert server.keys == {f"Bearer {KEY}"}


def test_a_drawn_completion_has_a_request_and_a_seed_of_its_own(server: FakeServer):
    drawn = Protocol(name="paper", max_tokens=8, temperature=0.7, top_p=0.9, seed=0)
    opened(server).generate(["a", "a", "b"], protocol=drawn, seeds=[1, 2, 3])
    sent = [body for _, body in server.asked]
    assert sorted(body["seed"] for body in sent) == [1, 2, 3]
    assert {(body["temperature"], body["top_p"], body["n"]) for body in sent} == {(0.7, 0.9, 1)}
    assert not any("repetition_penalty" in body for body in sent), "no part of OpenAI's protocol"
    server.owner = "vllm"
    opened(server).generate(["a"], protocol=GREEDY)
    assert server.asked[-1][1]["repetition_penalty"] == 1.0, (
        "else vLLM takes the model's generation_config.json"
    )
    assert "seed" not in server.asked[-1][1]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_vllm_server_is_told_what_ends_a_completion(server: FakeServer, model_dir: Path, api: str):
    server.models = [str(model_dir)]
    for owner, told in (
        ("vllm", [0, 3]),
        ("another", None),
    ):  # <|endoftext|>, and <|im_end|> of the chat template
        server.owner = owner
        opened(server, model=str(model_dir), api=api).generate(["a"], protocol=GREEDY)
        assert server.asked[-1][1].get("stop_token_ids") == told


def test_chat_sends_the_question_alone(server: FakeServer, tmp_path: Path):
    suite = Suite("words", "1", "exact_match", (Example("1", "ab", "AB"),), prompt="chat")
    settings = {"out_dir": tmp_path, "max_tokens": 8, "options": Options(base_url=server.url, api="chat")}
    result = evaluate(MODEL, [suite], backend="openai", **settings)
    assert (result.backend, result.suites["words"].right) == ("openai-chat", 1)
    assert server.asked[0][0] == "chat/completions"
    assert server.asked[0][1]["messages"] == [{"role": "user", "content": "ab"}]


def test_the_tokenizer_of_a_model_directory_makes_the_tokens(server: FakeServer, model_dir: Path):
    server.models = ["other", str(model_dir)]
    backend = opened(server, model=f"{model_dir}/../{model_dir.name}")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    backend.generate(["copy KTAB:"], protocol=GREEDY)
    assert server.asked[-1][1]["model"] == str(model_dir)
    assert server.asked[-1][1]["prompt"] == tokenizer("copy KTAB:")["input_ids"]
    assert backend.fingerprint is None, "the directory has its own"
    (scored,) = backend.loglikelihood([("copy KTAB:", "KTAB")])
    assert scored.num_tokens == len(tokenizer("KTAB")["input_ids"])
    assert (
        server.asked[-1][1]["prompt"] == tokenizer("copy KTAB:")["input_ids"] + tokenizer("KTAB")["input_ids"]
    )


def test_given_text_is_scored_by_the_tokens_it_has_more(server: FakeServer):
    backend = opened(server)
    (row,) = backend.choice_logprobs(["is it a or b:"], ["A", "b", "AB"])
    assert row == [LOGPROB, 2 * LOGPROB, 2 * LOGPROB]
    scored = backend.loglikelihood([("one:", "AAb"), ("", "two")])[0]
    assert (scored.logprob, scored.num_tokens) == (4 * LOGPROB, 3)
    server.width = 2
    with pytest.raises(
        EvaluationError, match="join the end of a prompt with 'A': name the model's directory"
    ):
        backend.choice_logprobs(["abc"], ["A"])


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_choices_need_log_probabilities_and_it_is_said_before_anything_is_asked(
    server: FakeServer, tmp_path: Path, api: str
):
    server.logprobs = False
    choices = Suite("letters", "1", "choice", (Example("1", "a or b:", "A"),), (" A", " B"))
    options = Options(base_url=server.url, api=api)
    settings = {"backend": "openai", "out_dir": tmp_path / "out", "max_tokens": 8, "options": options}
    with pytest.raises(EvaluationError, match=r"log probabilities of a given text.*leave those suites out"):
        evaluate(MODEL, [WORDS, choices], **settings)
    assert len(server.asked) == (1 if api == "completions" else 0)
    assert evaluate(MODEL, [WORDS], **settings).suites["words"].accuracy == 1


def test_a_busy_or_broken_server_is_asked_again(server: FakeServer):
    server.failures = [(429, {"Retry-After": "0.02"}), (500, {}), None, (503, {"Retry-After": "soon"})]
    answers = opened(server, batch_size=1).generate(["ab", "cd"], protocol=GREEDY)
    assert [answer.text for answer in answers] == ["AB", "CD"]
    assert len(server.asked) == 6


def test_a_server_that_takes_too_long_is_asked_twice(server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "SECONDS", 0.3)
    backend = opened(server)
    server.seconds = 1.0
    with pytest.raises(EvaluationError, match=r"does not answer \(ReadTimeout: .*tries: 2: see whether"):
        backend.generate(["ab"], protocol=GREEDY)
    assert len(server.asked) == 2


def test_what_is_answered_before_the_server_dies_is_not_asked_again(server: FakeServer, tmp_path: Path):
    def run(out: Path) -> Any:
        backend = opened(server, batch_size=1)
        return evaluate(MODEL, [WORDS], backend=backend, out_dir=out, max_tokens=8)

    server.dead_after = 2
    with pytest.raises(EvaluationError, match=r"answers 503 .*start again: answers so far are kept"):
        run(tmp_path)
    server.dead_after = None
    server.asked.clear()
    assert run(tmp_path).suites["words"].right == 4
    assert [body["prompt"] for _, body in server.asked] == ["ef", "gh"]


def test_what_another_try_does_not_mend_is_one_sentence_without_the_key(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    for status, words in (
        (400, "cannot answer"),
        (401, f"refuses the key: put the right one into {KEY_VARIABLE}"),
    ):
        server.failures = [(status, {})]
        with pytest.raises(EvaluationError, match=words) as caught:
            opened(server).generate(["ab"], protocol=GREEDY)
        assert "it does not work with Bearer ***" in str(caught.value)
    with pytest.raises(EvaluationError, match="has no model lower: it has upper"):
        opened(server, model="lower")
    suite = tmp_path / "words.jsonl"
    suite.write_text('{"prompt": "ab", "answer": "AB"}\n')
    out = tmp_path / "out"
    words = ["eval", MODEL, "--suite", str(suite), "--backend", "openai", "--out", str(out)]
    assert cli.main([*words, "--base-url", server.url]) == 0
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert f"set --base-url or {URL_VARIABLE}" in said.err
    written = [said.out, said.err, caplog.text, *(file.read_text() for file in out.iterdir())]
    assert len(written) == 5
    assert not any(KEY in text for text in written)


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"{KEY} x", f"{KEY}é", f"{KEY}\x7f", f"“{KEY}”"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str,
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(
        EvaluationError, match=f"the key in {KEY_VARIABLE} holds a blank.*set it again"
    ) as caught:
        opened(server)
    assert KEY not in str(caught.value) + caplog.text


def test_blanks_around_a_key_are_not_of_it(server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    opened(server).generate(["ab"], protocol=GREEDY)
    assert server.keys == {f"Bearer {KEY}"}


def test_what_the_connection_says_is_shown_without_the_key(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    """As it is, as repr shows it, and where the line is cut off within it."""
    key = "sk-a\\b'c\"d"
    monkeypatch.setenv(KEY_VARIABLE, key)
    backend = opened(server, first_wait=0.0001)
    for words in (f"Illegal header value {key.encode()!r}", f"with {key}", "x" * 295 + key, json.dumps(key)):

        def refused(*_: Any, words: str = words, **__: Any) -> None:
            raise httpx.LocalProtocolError(words)

        monkeypatch.setattr(httpx.Client, "request", refused)
        with pytest.raises(EvaluationError, match=r"LocalProtocolError: .*\*\*") as caught:
            backend.generate(["ab"], protocol=GREEDY)
        assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[bad/v1",
        "http://user:word@[bad/v1",
        "http://host:port/v1",
        "http://host:99999/v1",
        "http:///v1",
        "http://ho\x01st/v1",
        "host:8000/v1",
    ],
)
def test_a_malformed_address_is_one_sentence(url: str, server: FakeServer):
    with pytest.raises(EvaluationError, match=r"the server's address is .*: set --base-url or") as caught:
        opened(server, base_url=url)
    assert "word" not in str(caught.value)


def test_a_malformed_proxy_is_one_sentence(server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "ftp://user:word@proxy")
    with pytest.raises(EvaluationError, match=r"no connection to .* can be set up: see that") as caught:
        opened(server)
    assert "word" not in str(caught.value)


def test_an_answer_that_cannot_be_decoded_is_asked_for_again(server: FakeServer):
    backend = opened(server, first_wait=0.0001)
    server.failures = [(200, {"Content-Encoding": "gzip"})]
    assert [answer.text for answer in backend.generate(["ab"], protocol=GREEDY)] == ["AB"]
    server.failures = [(200, {"Content-Encoding": "gzip"})] * 10
    with pytest.raises(EvaluationError, match=r"does not answer \(DecodingError: .*tries: 8: see whether"):
        backend.generate(["ab"], protocol=GREEDY)


@pytest.mark.parametrize("asked", ["nan", "inf", "-inf", "soon", ""])
def test_a_wait_that_is_no_number_is_our_own(server: FakeServer, asked: str):
    backend = opened(server, first_wait=0.2)
    server.failures = [(503, {"Retry-After": asked})]
    start = time.monotonic()
    assert backend.generate(["ab"], protocol=GREEDY)[0].text == "AB"
    assert time.monotonic() - start > 0.14, "three quarters of the first wait, or more"


def test_an_address_where_nobody_answers(server: FakeServer):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(EvaluationError, match=f"the server {url} does not answer .*see whether it runs"):
        opened(server, base_url=url.replace("http://", "http://user:word@"))
