"""vLLM and `vllm serve` against transformers, on a model that asft exported: `make test-vllm`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from asft_eval.backends.hf import HfBackend
from asft_eval.backends.openai import OpenAIBackend
from asft_eval.backends.server import KEY_VARIABLE
from asft_eval.errors import EvaluationError
from asft_eval.result import read_result, read_samples
from asft_eval.run import evaluate
from asft_eval.types import Protocol
from vllm_questions import CHOICES, KEY, MAX_TOKENS, PROMPTS, SECONDS, SERVED, TEXTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * SECONDS)]

GREEDY = Protocol(max_tokens=MAX_TOKENS)
CLOSE = 1e-3  # natural logarithms; both compute in fp32


@pytest.fixture(scope="session")
def hf(exported: Path) -> HfBackend:
    return HfBackend(exported, batch_size=8)


@pytest.fixture
def server(base_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return base_url


def close(value: float) -> Any:
    return pytest.approx(value, abs=CLOSE)


def test_greedy_completions_equal_those_of_transformers_token_by_token(
    answers: dict[str, Any], exported: Path
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for prompt, tokens in zip(PROMPTS, answers["tokens"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not ids.numel():
            ids = torch.tensor([[tokenizer.eos_token_id]])
        out = model.generate(
            ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        assert tokens == out[0, ids.shape[1] :].tolist(), prompt
    assert sum(map(len, answers["tokens"])) > 150


def test_completions_equal_those_of_the_backend_hf(answers: dict[str, Any], hf: HfBackend):
    asked = [prompt for prompt in PROMPTS if prompt]
    found = [row for prompt, row in zip(PROMPTS, answers["completions"], strict=True) if prompt]
    assert found == [asdict(x) for x in hf.generate(asked, protocol=GREEDY)]
    assert answers["after"] == [row["text"] for row in answers["completions"][:2]]


def test_a_draw_depends_on_its_seed_alone(answers: dict[str, Any]):
    assert answers["together"] == answers["alone"]
    assert len(set(answers["several"])) > 5


def test_log_probabilities_of_choices_and_texts_equal_those_of_transformers(
    answers: dict[str, Any], hf: HfBackend
):
    for found, expected in zip(answers["choices"], hf.choice_logprobs(PROMPTS, CHOICES), strict=True):
        assert found == [close(x) for x in expected]
    for row, expected in zip(answers["texts"], hf.loglikelihood(TEXTS), strict=True):
        assert (row["logprob"], row["num_tokens"]) == (close(expected.logprob), expected.num_tokens)


def test_a_prompt_without_room_for_an_answer_is_one_sentence(answers: dict[str, Any]):
    assert "tokens and the model's context 2048, which leaves no room" in answers["too_long"]


def test_an_engine_that_is_killed_is_one_sentence(answers: dict[str, Any]):
    assert "vLLM's engine ended before everything was answered" in answers["killed"]


def test_asft_eval_gives_the_same_results(
    answers: dict[str, Any], exported: Path, suite: Path, evaluated: Path, tmp_path: Path
):
    evaluate(exported, [suite], backend="hf", out_dir=tmp_path / "hf", protocol="both", max_tokens=8)
    assert json.loads(answers["printed"])["backend"] == "vllm"
    ours, theirs = read_result(evaluated), read_result(tmp_path / "hf")
    assert "vllm" in ours.versions
    assert ours.suites["copy"].right == theirs.suites["copy"].right
    rows = [
        [(x["id"], x["completion"]) for x in read_samples(folder) if x["suite"] == "copy"]
        for folder in (evaluated, tmp_path / "hf")
    ]
    assert rows[0] == rows[1]
    assert len(read_samples(evaluated)) == 3 + 3 * 16


def test_a_closed_engine_leaves_no_process_and_nothing_that_watches_it(
    divided: dict[str, Any], answers: dict[str, Any]
):
    assert len(divided["processes"]) >= 4, "the engine, two workers, and a thread that watches them"
    assert divided["left"] == []
    assert answers["closed"] == 1, "asft eval closes what it opened"


def test_a_model_divided_over_two_processes_answers_alike(divided: dict[str, Any], hf: HfBackend):
    asked = [prompt for prompt in PROMPTS if prompt]
    found = [text for prompt, text in zip(PROMPTS, divided["completions"], strict=True) if prompt]
    assert found == [x.text for x in hf.generate(asked, protocol=GREEDY)]
    for row, expected in zip(divided["choices"], hf.choice_logprobs(PROMPTS, CHOICES), strict=True):
        assert row == [close(x) for x in expected]


@pytest.mark.parametrize("named", ["directory", "name"])
def test_vllm_serve_answers_as_transformers_do(server: str, exported: Path, hf: HfBackend, named: str):
    model = str(exported) if named == "directory" else SERVED
    backend = OpenAIBackend(model, base_url=server, batch_size=8)
    prompts = [prompt for prompt in PROMPTS if prompt]
    found = backend.generate(prompts, protocol=GREEDY)
    assert found == hf.generate(prompts, protocol=GREEDY)
    backend.require_logprobs()
    choices = [" A", "K"]
    asked = [prompt for prompt in prompts if prompt.strip()]
    for row, expected in zip(
        backend.choice_logprobs(asked, choices), hf.choice_logprobs(asked, choices), strict=True
    ):
        assert row == [close(x) for x in expected]
    texts = TEXTS[:-1]
    for row, expected in zip(backend.loglikelihood(texts), hf.loglikelihood(texts), strict=True):
        assert (row.logprob, row.num_tokens) == (close(expected.logprob), expected.num_tokens)


def test_vllm_serve_puts_questions_into_the_template(
    server: str, exported: Path, suite: Path, tmp_path: Path
):
    settings = {"max_tokens": 8, "prompt": "chat"}
    evaluate(exported, [suite], backend="hf", out_dir=tmp_path / "hf", **settings)
    backend = OpenAIBackend(SERVED, base_url=server, api="chat", batch_size=8)
    evaluate(SERVED, [suite], backend=backend, out_dir=tmp_path / "chat", **settings)
    rows = [[x["completion"] for x in read_samples(tmp_path / y)] for y in ("chat", "hf")]
    assert rows[0] == rows[1]


def test_vllm_serve_draws_by_the_seed_of_each_request(server: str):
    backend = OpenAIBackend(SERVED, base_url=server, batch_size=8)
    drawn = Protocol(name="paper", max_tokens=MAX_TOKENS, temperature=1.0, seed=0)
    first, again = (backend.generate(["story: the"] * 8, protocol=drawn, seeds=range(8)) for _ in range(2))
    assert first == again
    assert len({x.text for x in first}) > 2


def test_vllm_serve_refuses_another_key(base_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "another")
    with pytest.raises(EvaluationError, match=f"refuses the key: put the right one into {KEY_VARIABLE}"):
        OpenAIBackend(SERVED, base_url=base_url, batch_size=1)
