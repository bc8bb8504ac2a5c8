"""Drift, entropy and calibration on held-out text against a dense computation in fp64; texts, windows, what is kept between starts."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asft_eval import EvaluationError, drift, reading
from asft_eval.backends.hf import encode_pair, load_tokenizer
from asft_eval.drift import DriftRequest, calibration, figures, histogram
from asft_eval.held_out import HeldOut, read_held_out
from asft_eval.reading import Tokens, read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    ("copy KTAB:", "KTAB"),
    ("add 33+7:", "40 or so"),
    ("swap AB CD:", "CD AB and more"),
    ("", "any text"),
]


@pytest.fixture(scope="module")
def encoded(model_dir: Path) -> list[tuple[list[int], int]]:
    return [encode_pair(load_tokenizer(model_dir), *text, end=True) for text in TEXTS]


def dense(model_dir: Path, ids: list[int], start: int) -> Any:
    """Log probabilities `[t, v]` in fp64 of what follows the prompt, all at once."""
    opener: Any = AutoModelForCausalLM
    model = opener.from_pretrained(model_dir, dtype=torch.float64)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)


def expected(policy_dir: Path, ref_dir: Path, ids: list[int], start: int) -> dict[str, float]:
    log_p, log_q = (dense(folder, ids, start) for folder in (policy_dir, ref_dir))
    labels = torch.tensor(ids[start:])[:, None]
    sums = {
        "forward_kl": torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum"),
        "reverse_kl": torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"),
    }
    for prefix, log in (("", log_p), ("base_", log_q)):
        sums |= {
            f"{prefix}nll": -log.gather(-1, labels).sum(),
            f"{prefix}entropy": torch.distributions.Categorical(logits=log).entropy().sum(),
            f"{prefix}label_probability": log.exp().gather(-1, labels).sum(),
            f"{prefix}confidence": log.exp().amax(-1).sum(),
            f"{prefix}hit": (log.argmax(-1, keepdim=True) == labels).sum(),
        }
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-4), (torch.float64, 1e-9)])
def test_every_figure_equals_the_dense_one(
    model_dir: Path, moved_dir: Path, encoded: list[tuple[list[int], int]], dtype: torch.dtype, within: float,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(reading, "_LOGITS_AT_ONCE", 1)  # the smallest blocks there are
    read = read_texts(moved_dir, model_dir, encoded, pad_id=0, batch_size=3, dtype=dtype)
    assert read.counts().tolist() == [len(ids) - start for ids, start in encoded]
    for place, (ids, start) in enumerate(encoded):
        for name, value in expected(moved_dir, model_dir, ids, start).items():
            assert read.by_text(name)[place] == pytest.approx(value, rel=within, abs=1e-12), name


def test_a_model_in_bf16_has_logits_in_fp32(model_dir: Path, encoded: list[tuple[list[int], int]]):
    """Weights in bf16, as on GPUs: what is scored equals fp32 products of their own hidden states, which bf16 logits miss by steps of 1/32 and more."""
    model = reading.load_model(model_dir, dtype=torch.bfloat16)
    read = read_texts(model_dir, None, encoded, pad_id=0, batch_size=1, dtype=torch.bfloat16)
    for place, (ids, start) in enumerate(encoded):
        with torch.inference_mode():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1]
            logits = hidden.double() @ model.get_output_embeddings().weight.double().T
        nll = -logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum()
        assert read.by_text("nll")[place] == pytest.approx(float(nll), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2**25])
def test_a_head_in_parts_is_the_whole_head(rows: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((37, 16), (37,), (5, 16))
    )
    monkeypatch.setattr(reading, "_LOGITS_AT_ONCE", rows)
    logits = reading.Head(weight, bias).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T + bias.float())


def test_on_gpus_models_are_read_as_they_are_stored(
    model_dir: Path, moved_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert reading.reading_dtype(model_dir) == torch.float32, "on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reading.reading_dtype(model_dir) == torch.bfloat16
    shutil.copy(moved_dir / "model.safetensors", tmp_path)
    assert reading.reading_dtype(tmp_path) == torch.float32, "config.json says nothing, the files do"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_exactly_no_drift_from_itself(
    model_dir: Path, encoded: list[tuple[list[int], int]], dtype: torch.dtype
):
    read = read_texts(model_dir, model_dir, encoded, pad_id=0, batch_size=2, dtype=dtype)
    found = figures(read, HeldOut("x", "y", 64, encoded, 0, 0), {"path": "b", "fingerprint": "f"})
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["forward_kl"] == found["reverse_kl"] == found["nll_change"] == nothing
    assert {
        key: value for key, value in found["base"].items() if key not in ("path", "fingerprint")
    } == found["model"]
    assert found["model"]["perplexity"] == pytest.approx(math.exp(found["model"]["nll"]["value"]))


def test_logits_that_are_more_than_the_heads_product_are_refused(
    model_dir: Path, encoded: list[tuple[list[int], int]], monkeypatch: pytest.MonkeyPatch
):
    whole = reading.load_model

    def capped(*arguments: Any, **named: Any) -> Any:
        model = whole(*arguments, **named)
        forward = model.forward

        def softcapped(**call: Any) -> Any:
            out = forward(**call)
            out.logits = 5 * torch.tanh(out.logits / 5)
            return out

        model.forward = softcapped
        return model

    monkeypatch.setattr(reading, "load_model", capped)
    with pytest.raises(EvaluationError, match="not its head's product alone"):
        read_texts(model_dir, None, encoded, pad_id=0, batch_size=2)


def test_calibration_by_hand():
    found = calibration([0.95, 0.95, 0.95, 1.0, 0.15], [1, 1, 0, 1, 1])
    assert found["ece"] == pytest.approx((4 * abs(0.9625 - 0.75) + abs(0.15 - 1)) / 5)
    assert [one["tokens"] for one in found["bins"]] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    rng = np.random.default_rng(0)
    sure = rng.random(50_000)
    assert calibration(sure, rng.random(50_000) < sure)["ece"] < 0.01


def test_histogram_by_hand():
    found = histogram([0.0, 0.04, 0.5, 1.0])
    assert (len(found["edges"]), found["shares"][0], found["shares"][10], found["shares"][19]) == (
        21,
        0.5,
        0.25,
        0.25,
    )


def test_intervals_are_over_texts_weighted_by_their_tokens():
    text = np.repeat(np.arange(40), np.arange(1, 41))
    values = np.random.default_rng(1).normal(2.0, 0.1, len(text)) + (text % 2)
    names = ("nll", "entropy", "label_probability", "confidence", "hit")
    read = Tokens(text, dict.fromkeys(names, np.clip(values / 10, 0, 1)))
    nll = figures(read, HeldOut("x", "y", 64, [([1], 0)] * 40, 0, 0), None)["model"]["nll"]
    assert nll["value"] == pytest.approx(np.clip(values / 10, 0, 1).mean())
    assert 0.01 < nll["high"] - nll["low"] < 0.06, "texts are of two kinds, tokens of one text are alike"


def test_all_figures_come_from_one_set_of_resamples_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    text = np.repeat(np.arange(40), np.arange(1, 41))
    rng = np.random.default_rng(2)
    read = Tokens(text, {name: rng.random(len(text)) for name in reading._NAMES})
    calls: list[set[str]] = []
    whole = drift.bootstrap_together
    monkeypatch.setattr(
        drift, "bootstrap_together", lambda sums, weights: calls.append(set(sums)) or whole(sums, weights)
    )
    with caplog.at_level("INFO", logger="asft_eval.drift"):
        found = figures(read, HeldOut("x", "y", 64, [([1], 0)] * 40, 0, 0), {"path": "b", "fingerprint": "f"})
    assert [len(names) for names in calls] == [7]
    assert "10000 resamples of 40 texts" in caplog.text
    for name in ("forward_kl", "reverse_kl"):
        assert found[name]["value"] == pytest.approx(read.figures[name].mean())
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_windows_cover_a_text_and_pairs_are_cut(model_dir: Path, tmp_path: Path):
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    (tmp_path / "long.txt").write_text("a word and another. " * 30)
    whole = read_held_out(tmp_path / "long.txt", tokenizer, positions=16)
    assert all(len(ids) <= 16 for ids, _ in whole.encoded)
    scored = [token for ids, start in whole.encoded for token in ids[start:]]
    assert scored == tokenizer("a word and another. " * 30, add_special_tokens=False)["input_ids"]
    rows = [{"prompt": "p", "response": "long " * 30}, {"prompt": "long " * 30, "answer": "x"}, {"text": "t"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_held_out(tmp_path / "rows.jsonl", tokenizer, positions=16)
    assert (len(found.encoded), found.cut, found.left_out) == (2, 1, 1)
    marked = tmp_path / "rows.jsonl.gz"
    marked.write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes()))
    assert read_held_out(marked, tokenizer, positions=16).encoded == found.encoded


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no text to score"),
        ('{"prompt": "a"}\n', "line 1 of .* has no prompt and response, nor a text"),
        ('{"text": "a"}\n[1\n', "line 2 of .* is no JSON"),
        ('"a"\n', "line 1 of .* has no prompt and response"),
        ("[" * 100_000, "line 1 of .* is no JSON .nested too deeply"),
        ('\n{"text": "a\\ud800"}', "line 2 of .* is no JSON .*surrogate"),
        ("ä".encode("latin-1"), "cannot be read as text .line 1 is not UTF-8"),
    ],
)
def test_texts_that_cannot_be_read(model_dir: Path, tmp_path: Path, content: str | bytes, says: str):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=says):
        read_held_out(file, load_tokenizer(model_dir), positions=64)
    with pytest.raises(EvaluationError, match="cannot be read as text"):
        read_held_out(tmp_path / "none.txt", load_tokenizer(model_dir), positions=64)


def test_what_was_measured_is_kept(
    model_dir: Path, moved_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "copy KTAB:", "response": "KTAB"}\n' * 3)
    asked = DriftRequest(text=file, base=model_dir)
    found = drift.measure(moved_dir, asked, tmp_path / "out")
    assert found["forward_kl"]["value"] > 0
    assert found["dtype"] == "float32"
    assert (
        found["tokens"]
        == 3 * json.loads((tmp_path / "out" / "held_out.json").read_text())["texts"][0]["tokens"]
    )
    monkeypatch.setattr(drift, "read_texts", lambda *_, **__: pytest.fail("measured twice"))
    assert drift.measure(moved_dir, asked, tmp_path / "out") == found
    (tmp_path / "out" / "held_out.json").write_text("{torn")
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        drift.measure(moved_dir, asked, tmp_path / "out")
