"""How an example is shown: what is learned, where tokens end, and nothing that steers the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from asft_nemo.commands.check_words import check_words, coloured, example_words
from asft_nemo.config.schema import DataConfig
from asft_nemo.data import TextTokenizer
from asft_nemo.data.inspection import EntryCounts, Inspection, Shown
from asft_nemo.data.templates import Rendered

MODEL = Path(__file__).parents[3] / "assets" / "tiny-base"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(MODEL)


def shown(tokenizer: TextTokenizer, prompt: str, response: str) -> Shown:
    span = (len(prompt), len(prompt) + len(response))
    example = tokenizer.encode([Rendered(prompt + response, (span,))])[0]
    return Shown("rows.jsonl", 7, example.tokens, example.learned)


@pytest.mark.parametrize("text", ["add 1 and 2", "é 東京 🙂", "a\nb", "x" * 50])
def test_learned_text_is_marked_and_nothing_is_lost(tokenizer: TextTokenizer, text: str) -> None:
    head, body = example_words(shown(tokenizer, "Q:", text), DataConfig(), tokenizer, colour=False).split(
        "\n", 1
    )
    assert head.startswith("rows.jsonl:7: ")
    prompt, learned = body.replace("·", "").split("[[")
    assert (prompt, learned) == ("Q:", f"{text}<|endoftext|>]]")


def test_colours_stand_around_the_same_text(tokenizer: TextTokenizer) -> None:
    example = shown(tokenizer, "Q:", "four")
    words = example_words(example, DataConfig(), tokenizer, colour=True)
    body = words.split("\n", 1)[1]
    assert "\033[32m\033[7m<|endoftext|>\033[0m" in body
    assert "\033[32m" not in body[: body.index("f")].rsplit("\033[0m", 1)[0]  # nothing of the prompt
    assert "[[" not in body


def test_control_characters_of_a_row_are_written_out(tokenizer: TextTokenizer) -> None:
    words = example_words(shown(tokenizer, "\x1b[2J\r", "\x07"), DataConfig(), tokenizer, colour=False)
    assert not any(char < " " and char != "\n" for char in words)
    assert "\\x1b" in words
    assert "\\r" in words


def test_the_middle_of_a_long_example_is_left_out(tokenizer: TextTokenizer) -> None:
    example = shown(tokenizer, "Q:", "word " * 2000)
    words = example_words(example, DataConfig(sequence_length=100), tokenizer, colour=False)
    assert f"\n... {len(example.tokens) - 600} tokens ...\n" in words
    assert "longer than data.sequence_length=100" in words


def test_the_bound_stands_between_bars() -> None:
    entry = EntryCounts("all", rows=30)
    for length in [*range(10, 35), 200]:
        entry.add(length, [False] + [True] * (length - 1), DataConfig(sequence_length=31))
    lines = check_words(Inspection([entry]), DataConfig(sequence_length=31), "DIR").splitlines()
    place = next(i for i, line in enumerate(lines) if "data.sequence_length=31 --" in line)
    assert lines[place - 1].split()[0].endswith("-32")  # 31 tokens go in, and a label more
    assert lines[place + 1].split()[0].startswith("33-")
    assert lines[-1].startswith("3 examples are longer")


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured("auto", Terminal())
    assert not coloured("auto", io.StringIO())
    assert coloured("always", io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured("auto", Terminal())
    assert coloured("always", Terminal())
