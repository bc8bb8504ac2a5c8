"""The asset that the demo starts from, and the script that made it."""

from __future__ import annotations

import importlib.util
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from asft_eval.backends import Options
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from asft_nemo.demo import skills

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "assets" / "tiny-base"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "tools" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_base"] = module
    spec.loader.exec_module(module)
    return module


def test_size_and_shape():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 6_000_000
    config = AutoConfig.from_pretrained(BASE)
    assert config.model_type == "qwen2"
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 256, 512)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert not config.tie_word_embeddings
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert weights.get_slice("lm_head.weight").get_shape() == [512, 256]


def test_tokenizer(tokenizer: Any):
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for letter in skills.LETTERS:
        assert len(tokenizer(letter)["input_ids"]) == 1
    text = "Any text at all: 3 < 5, naïve café, 日本 \n\t\U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_examples_tokenise_alike_whole_and_in_parts(tokenizer: Any):
    for prompt, response in [*skills.held_out_text(64, 0), *skills.new_skill_train(64, 0)]:
        parts = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
        assert tokenizer(prompt + response)["input_ids"] == parts
        assert len(parts) < 64


def test_the_base_has_the_old_skills_and_half_knows_the_new_one(tmp_path: Path):
    torch.set_num_threads(1)
    suites = [suite_from_pairs(name, samples) for name, samples in skills.old_skill_tests(40, 1).items()]
    suites.append(suite_from_pairs(skills.NEW_SKILL, skills.new_skill_test(100, 1)))
    result = evaluate(
        BASE, suites, backend="hf", out_dir=tmp_path, max_tokens=12, options=Options(batch_size=128)
    )
    for name in skills.OLD_SKILLS:
        assert result.suites[name].accuracy >= 0.85, name
    assert 0.3 < result.suites[skills.NEW_SKILL].accuracy < 0.8


def test_pretraining_rows_label_responses_and_nothing_else(maker: ModuleType, tokenizer: Any):
    recipe = maker.Recipe(rows=4, row_tokens=64)
    tokens, labels = next(maker.rows_of_text(tokenizer, recipe))
    assert tokens.shape == labels.shape == (4, 64)
    expected = [
        id_
        for prompt, response in islice(skills.pretraining_samples(recipe.seed), 8)
        for id_ in [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    ]
    labelled = labels[labels != maker.IGNORED].tolist()
    assert labelled[: len(expected)] == expected
    shifted = labels[:, :-1] != maker.IGNORED
    assert torch.equal(labels[:, :-1][shifted], tokens[:, 1:][shifted]), "a label is the next token"


def test_the_tokenizer_is_remade_from_the_seed(maker: ModuleType, tokenizer: Any):
    assert maker.make_tokenizer(maker.Recipe.seed).get_vocab() == tokenizer.get_vocab()
