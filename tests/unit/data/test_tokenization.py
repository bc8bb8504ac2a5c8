"""The loss mask covers the response and the end token, whatever the tokenizer merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from asft_nemo.data import PROMPTS, TextTokenizer, Tokenized, render
from asft_nemo.errors import DataError

ALPACA_BYTES = (
    b"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    b"### Instruction:\nadd {two} numbers\n\n### Response:42"
)
TEXTS = st.text(st.sampled_from("aT:h e\n4é東\t'{}"), min_size=1, max_size=30)


def learned(tokenizer: TextTokenizer, example: Tokenized) -> list[int]:
    return [token for token, counts in zip(example.tokens, example.learned, strict=True) if counts]


def first_learned(example: Tokenized) -> int:
    return example.learned.index(True)


def test_alpaca_is_the_papers_text_byte_for_byte() -> None:
    rendered = render("alpaca", "add {two} numbers", "42")
    assert rendered.text.encode() == ALPACA_BYTES
    assert [rendered.text[slice(*span)] for span in rendered.learned] == ["42"]


def test_raw_adds_nothing() -> None:
    assert render("raw", "a", "b")[:2] == ("ab", ((1, 2),))


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=", ".join(PROMPTS)):
        render("alpacca", "a", "b")


def test_learned_tokens_are_the_response_and_one_end_token(tokenizer: TextTokenizer) -> None:
    [example] = tokenizer.encode([render("alpaca", "add two numbers", "The answer is 42.")])
    tokens = learned(tokenizer, example)
    assert tokens[-1] == tokenizer.eos_id
    assert example.tokens.count(tokenizer.eos_id) == 1
    text = tokenizer.decode(tokens[:-1])
    if tokenizer.decode(example.tokens[: first_learned(example)]).endswith("Response:"):
        assert text == "The answer is 42."
    else:  # one token holds the colon and the response's first characters
        assert text.endswith("The answer is 42.")


def test_a_token_across_the_boundary_is_learned(tokenizer_dirs: dict[str, Path]) -> None:
    tokenizer = TextTokenizer.load(tokenizer_dirs["merges_anything"])
    rendered = render("raw", "### Response:", "The answer")
    [example] = tokenizer.encode([rendered])
    first = tokenizer.decode(example.tokens[first_learned(example) : first_learned(example) + 1])
    # The case this test is about must really occur: the token holds characters of both sides.
    assert first not in "The answer"
    assert first not in "### Response:"
    apart = tokenizer.encode([render("raw", "### Response:", "")])[0].tokens[:-1]
    assert example.tokens[: len(apart)] != apart, (
        "tokenised apart, the prompt has other tokens than in the whole"
    )
    assert "The answer" in tokenizer.decode(learned(tokenizer, example))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS, response=TEXTS)
def test_every_response_character_is_learned_and_little_else(
    tokenizer: TextTokenizer, prompt: str, response: str
) -> None:
    [example] = tokenizer.encode([render("raw", prompt, response)])
    tokens = learned(tokenizer, example)
    assert tokens[-1] == tokenizer.eos_id
    assert example.tokens.count(tokenizer.eos_id) == 1
    bare = tokens[1:-1]  # without the token that may lie across the boundary
    whole, tail = tokenizer.decode(tokens[:-1]), tokenizer.decode(bare) if bare else ""
    assert len(whole.strip()) >= len(response.strip())
    # Without its first token, what is learned holds nothing of the prompt.
    assert len(tail.encode()) <= len(response.encode()) + 3 * tail.count("�")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS, response=TEXTS)
def test_one_character_tells_what_all_offsets_tell(
    tokenizer: TextTokenizer, prompt: str, response: str
) -> None:
    """The short way to the learned tokens of a last span, beside the long one."""
    rendered = render("raw", prompt, response)
    [quick] = tokenizer.encode([rendered])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asft_nemo.data.tokenization._learned_to_the_end", lambda *_: None)
        assert tokenizer.encode([rendered]) == [quick]


def test_special_tokens_in_a_record_are_text(tokenizer: TextTokenizer) -> None:
    [example] = tokenizer.encode([render("raw", "say <|end|>", "x<|pad|>y<|end|>")])
    assert example.tokens.count(tokenizer.eos_id) == 1
    assert tokenizer.pad_id not in example.tokens
    assert example.tokens[-1] == tokenizer.eos_id


def test_begin_tokens_come_once_and_first(tokenizer_dirs: dict[str, Path]) -> None:
    llama = TextTokenizer.load(tokenizer_dirs["sentencepiece_like"])
    [example] = llama.encode([render("raw", "a ", "b")])
    assert len(llama.begin_ids) == 1
    assert example.tokens[0] == llama.begin_ids[0]
    assert example.tokens.count(llama.begin_ids[0]) == 1
    assert first_learned(example) >= 1
    assert TextTokenizer.load(tokenizer_dirs["gpt2_like"]).begin_ids == []


def test_a_batch_is_its_parts(tokenizer: TextTokenizer) -> None:
    rendered = [render("raw", "question:", word) for word in ("The", "answer", "42")]
    assert tokenizer.encode(rendered) == [tokenizer.encode([one])[0] for one in rendered]
    assert tokenizer.encode([]) == []


def test_a_tokenizer_without_end_token_is_refused(tokenizer_dirs: dict[str, Path]) -> None:
    backend = Tokenizer.from_file(str(tokenizer_dirs["gpt2_like"] / "tokenizer.json"))
    with pytest.raises(DataError, match="no end token"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_without_padding_token_the_end_token_pads(tokenizer_dirs: dict[str, Path]) -> None:
    backend = Tokenizer.from_file(str(tokenizer_dirs["gpt2_like"] / "tokenizer.json"))
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"))
    assert tokenizer.pad_id == tokenizer.eos_id


def test_a_folder_that_transformers_would_convert_is_refused(
    tokenizer_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = json.loads((tokenizer_dirs["gpt2_like"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
    with pytest.raises(DataError, match=r"no tokenizer\.json: .*save_pretrained"):
        TextTokenizer.load(tmp_path)
    # the cure
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert TextTokenizer.load(tmp_path).size >= len(model["vocab"])


def test_a_folder_without_tokenizer_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json: add it"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(DataError, match="not a directory"):
        TextTokenizer.load(tmp_path / "nowhere")
