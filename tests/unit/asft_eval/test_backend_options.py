"""Options that a backend would ignore, a backend that is not installed, and how many GPUs share a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import BACKENDS, Options, check_options
from asft_eval.backends.fake import FakeBackend
from asft_eval.backends.vllm import shared_by
from asft_eval.run import evaluate
from asft_eval.types import Example, Suite

from asft_nemo import cli


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hff", Options(), "there is no backend 'hff': did you mean 'hf'\\? choose one of hf, openai, vllm"),
        ("hf", Options(tensor_parallel_size=2), "says nothing to the backend hf: leave it out, or choose backend vllm"),
        ("vllm", Options(base_url="http://x"), "choose backend openai"),
        ("openai", Options(batch_size=0), "batch_size is 0: give at least 1"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(name: str, options: Options, words: str):
    with pytest.raises(EvaluationError, match=words):
        check_options(name, options)


def test_options_that_can(model_dir: Path):
    for name in BACKENDS:
        check_options(name, Options(batch_size=8))


def test_where_vllm_is_not_installed_one_sentence_says_how_to_get_it(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import then fails as if it were not there
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "1")  # what opening sets goes with this test
    suite = tmp_path / "words.jsonl"
    suite.write_text('{"prompt": "ab", "answer": "AB"}\n')
    words = ["eval", str(model_dir), "--suite", str(suite), "--backend", "vllm", "--out", str(tmp_path / "o")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "backend vllm needs vLLM, which" in said
    assert "docs/evaluation.md" in said
    assert "Dockerfile's target eval" in said
    assert len(said.splitlines()) == 1


def test_a_grader_that_is_not_installed_is_said_before_anything_is_asked(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    suite = Suite("sums", "1", "math", (Example("1", "1+1", "2"),))
    backend = FakeBackend(str.upper)
    with pytest.raises(EvaluationError, match="suite sums is graded by math-verify, which this Python lacks"):
        evaluate(model_dir, [suite], backend=backend, out_dir=tmp_path, max_tokens=8)
    assert backend.asked == []


@pytest.mark.parametrize(
    ("heads", "kv_heads", "visible", "number"),
    [
        (28, 4, 8, 4),  # Qwen2.5-7B: its 28 heads are not divided by 8
        (64, 8, 8, 8),  # Qwen2.5-72B
        (32, 8, 3, 2),
        (40, 8, 16, 8),  # Qwen2.5-32B
        (64, 8, 16, 16),  # key-value heads are repeated
        (32, None, 4, 4),  # Llama-2: as many as query heads
        (12, 2, 0, 1),
    ],
)
def test_gpus_that_share_heads_evenly(
    tmp_path: Path, heads: int, kv_heads: int | None, visible: int, number: int
):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shared_by(tmp_path, visible) == number
