"""From rendered text to tokens and the tokens that are learned.

The text is tokenised as a whole and the boundaries found through the tokenizer's character offsets: a token that
holds a character of a learned span is learned. Tokenising prompt and response apart can give other tokens than the
whole has, and then the model learns text it never sees at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asft_nemo.data.chat import ChatTemplate
from asft_nemo.data.marking import CLOSE, OPEN, marked_tokenizer
from asft_nemo.data.templates import Rendered
from asft_nemo.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """A whole example as tokens; `learned` says of each whether the model learns to say it."""

    tokens: list[int]
    learned: list[bool]


class TextTokenizer:
    """A fast Hugging Face tokenizer used in one fixed way: begin tokens as the tokenizer sets them, the end
    token once, and the text of control tokens inside a record read as plain text.

    Attributes:
        eos_id: the end token.
        pad_id: the padding token, or the end token where the tokenizer has none; never learned either way.
        begin_ids: tokens the tokenizer puts before every text, for example BOS.
        size: number of token ids, added tokens included.
        folder: where it was read from.
        control: the control tokens (special tokens of the tokenizer), ids to names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        name = tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer in {name} has no tokenizer.json, which gives character offsets: convert it"
            )
        end: Any = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                f"the tokenizer in {name} has no end token: set eos_token in its tokenizer_config.json"
            )
        self._tokenizer, self.folder = tokenizer, name
        self.eos_id = int(end)
        pad: Any = tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.size = max(tokenizer.get_vocab().values()) + 1
        backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 (the base class does not declare it)
        self._marked, self._moved, self.control = marked_tokenizer(backend)
        self.begin_ids = self._find_begin_ids()

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Reads the tokenizer of a local Hugging Face directory; never asks a hub.

        Raises:
            DataError: the directory has no tokenizer.json (from other files transformers would convert one, but fingerprints do not hold
                those), or none that can be read.
        """
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise DataError(
                f"{folder} is not a directory: give the Hugging Face directory that holds the tokenizer"
            )
        if not (Path(folder) / "tokenizer.json").is_file():
            raise DataError(
                f"no tokenizer can be read from {folder}, for it has no tokenizer.json: add it, or make it from the other files with transformers' "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))  # nosec B615 # a directory
        except Exception as error:  # tokenizers raises nothing more special
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"no tokenizer can be read from {folder} ({reason}): correct its tokenizer.json"
            ) from error

    def refuse_smaller_model(self, vocab_size: int) -> None:
        """Holds the token ids against the rows of the model's embeddings.

        Raises:
            DataError: there are more ids than rows.
        """
        if self.size > vocab_size:
            raise DataError(
                f"the tokenizer has {self.size} tokens but the model only {vocab_size} rows: use the model's own tokenizer"
            )

    def chat_template(self) -> ChatTemplate:
        """The tokenizer's own.

        Raises:
            DataError: it has none.
        """
        return ChatTemplate(self._tokenizer, list(self.control.values()))

    def encode(self, examples: Sequence[Rendered]) -> list[Tokenized]:
        """Tokenises whole examples: begin tokens, text, end token, as each example asks for them.

        A token is learned when it holds a character of a learned span: one that lies across the beginning of a span is learned,
        otherwise the response's first characters would not be.
        """
        encoded = self._marked.encode_batch([example.text for example in examples], add_special_tokens=False)
        return [self._assemble(example, found) for example, found in zip(examples, encoded, strict=True)]

    def _assemble(self, example: Rendered, found: Encoding) -> Tokenized:
        ids: list[int] = list(found.ids)  # type: ignore[arg-type]
        if self._moved:
            ids = [self._moved.get(number, number) for number in ids]
        learned = _learned_to_the_end(example, found, len(ids))
        if learned is None:
            learned = self._learned(example, ids, found.offsets)
        begin, end = self.begin_ids if example.begin else [], [self.eos_id] if example.end else []
        return Tokenized([*begin, *ids, *end], [*(False for _ in begin), *learned, *(True for _ in end)])

    def _learned(self, example: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> list[bool]:
        """Of every token whether it is learned, from the characters that each has."""
        # Several times as fast as an array of the pairs.
        places = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
        if OPEN in example.text:
            self._place_control_tokens(example.text, ids, places)
        learned = np.zeros(len(ids), dtype=bool)
        for start, stop in example.learned:
            first = np.flatnonzero(places[:, 1] > start)[:1]
            # Offsets of blanks can be empty, so a span that reaches the end of the text takes all that is left.
            last = np.flatnonzero(places[:, 0] < stop)[-1:] if stop < len(example.text) else [len(ids) - 1]
            if len(first) and len(last):
                learned[first[0] : last[0] + 1] = True
        return learned.tolist()

    def _place_control_tokens(self, text: str, ids: list[int], places: np.ndarray) -> None:
        """Corrects the offsets of control tokens: one may swallow blanks beside it, whose place says nothing about whose it is."""
        found = 0
        for i, number in enumerate(ids):
            start = text.find(OPEN, *places[i].tolist()) if number in self.control else -1
            if start >= 0:
                places[i] = start, text.index(CLOSE, start) + 1
                found += 1
        if found != text.count(OPEN):
            raise DataError(
                f"the tokenizer in {self.folder} does not read each control token of its chat template as one token: set "
                "data.template=alpaca or raw"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens included."""
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _find_begin_ids(self) -> list[int]:
        bare = list(self._tokenizer.encode("a", add_special_tokens=False))
        whole = list(self._tokenizer.encode("a", add_special_tokens=True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []


def _learned_to_the_end(example: Rendered, found: Encoding, count: int) -> list[bool] | None:
    """`TextTokenizer._learned` where one span reaches the end of a text without control tokens: the tokens from the first that holds the
    span's first character. None where that is not so.

    It asks for one character instead of having all offsets made into Python numbers, a tenth of the time.
    """
    if len(example.learned) != 1 or OPEN in example.text:
        return None
    ((start, stop),) = example.learned
    first = found.char_to_token(start) if start < stop == len(example.text) else None
    return None if first is None else [False] * first + [True] * (count - first)
