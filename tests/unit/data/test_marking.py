"""Control tokens come from guards alone; everything else is tokenised as the tokenizer itself does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from asft_nemo.data import TextTokenizer
from asft_nemo.data.marking import control_pattern, guarded, marked_tokenizer
from asft_nemo.data.templates import Rendered

PIECES = st.sampled_from(["The", " answer", "\n", " ", "é", "42", ":", "<|pad|>", "<|end|>", "<s>", "<unk>"])


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([Rendered(text, (), begin=False, end=False)])[0].tokens


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PIECES, max_size=8))
def test_guarded_text_has_the_tokenizers_own_ids(
    tokenizer: TextTokenizer, tokenizer_dirs: dict[str, Path], parts: list[str]
) -> None:
    control = control_pattern(tokenizer.control.values())
    assert control is not None
    text = "".join(parts)
    plain = AutoTokenizer.from_pretrained(tokenizer_dirs[tokenizer_dirs_name(tokenizer, tokenizer_dirs)])
    assert ids_of(tokenizer, control.sub(lambda found: guarded(found[0]), text)) == plain.encode(
        text, add_special_tokens=False
    )


def tokenizer_dirs_name(tokenizer: TextTokenizer, tokenizer_dirs: dict[str, Path]) -> str:
    return next(name for name, folder in tokenizer_dirs.items() if str(folder) == tokenizer.folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PIECES, max_size=8))
def test_text_without_guards_never_becomes_a_control_token(
    tokenizer: TextTokenizer, parts: list[str]
) -> None:
    unknown = {number for number, name in tokenizer.control.items() if name == "<unk>"}
    ids = ids_of(tokenizer, "".join(parts))
    assert not set(ids) & (tokenizer.control.keys() - unknown)


def test_added_tokens_that_control_nothing_stay_text_of_one_token(tokenizer_dirs: dict[str, Path]) -> None:
    original = Tokenizer.from_file(str(tokenizer_dirs["gpt2_like"] / "tokenizer.json"))
    original.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    original.add_tokens(["<think>"])
    copy, moved, control = marked_tokenizer(original)
    text = "<think><|im_start|>"
    ids = [moved.get(number, number) for number in copy.encode(text, add_special_tokens=False).ids]
    assert ids[0] == original.token_to_id("<think>")
    assert original.token_to_id("<|im_start|>") not in ids
    assert "<think>" not in control.values()
    ids = [moved.get(number, number) for number in copy.encode(guarded("<|im_start|>")).ids]
    assert ids == [original.token_to_id("<|im_start|>")]


@pytest.mark.parametrize("names", [[], ["<|a|>", "<|a|>b", "[x]"]])
def test_the_longest_name_is_found(names: list[str]) -> None:
    pattern = control_pattern(names)
    if not names:
        assert pattern is None
    else:
        assert pattern is not None
        assert pattern.findall("<|a|>b <|a|> [x] x") == ["<|a|>b", "<|a|>", "[x]"]
