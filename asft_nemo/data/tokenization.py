"""From rendered text to tokens and the tokens that are learned.

The text is tokenised as a whole and the boundary found through the tokenizer's character offsets.
Tokenising prompt and response apart can give other tokens than the whole has, and then the model learns
text it never sees at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.data.templates import Rendered
from asft_nemo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """A whole example as tokens; from `response_start` on they hold the response, then the end token."""

    tokens: list[int]
    response_start: int


class TextTokenizer:
    """A fast Hugging Face tokenizer used in one fixed way: begin tokens as the tokenizer sets them, the end
    token once, and the text of special tokens inside a record read as plain text.

    Attributes:
        eos_id: the end token.
        pad_id: the padding token, or the end token where the tokenizer has none; never learned either way.
        begin_ids: tokens the tokenizer puts before every text, for example BOS.
        size: number of token ids, added tokens included.
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
        self._tokenizer = tokenizer
        self.eos_id = int(end)
        pad: Any = tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.size = max(tokenizer.get_vocab().values()) + 1
        self.begin_ids = self._find_begin_ids()

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        """Reads the tokenizer of a local Hugging Face directory; never asks a hub.

        Raises:
            DataError: the directory has no tokenizer that can be read.
        """
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise DataError(
                f"{folder} is not a directory: give the Hugging Face directory that holds the tokenizer"
            )
        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"no tokenizer can be read from {folder} ({reason}): add its tokenizer.json"
            ) from error

    def encode(self, examples: Sequence[Rendered]) -> list[Tokenized]:
        """Tokenises whole examples: begin tokens, text, end token."""
        if not examples:
            return []
        texts = [example.text for example in examples]
        encoded: Any = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=True,
            verbose=False,
        )
        result: list[Tokenized] = []
        for example, ids, offsets in zip(
            examples, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # A token across the boundary is learned: otherwise the response's first characters would not be.
            first = next((i for i, (_, end) in enumerate(offsets) if end > example.response_start), len(ids))
            result.append(Tokenized([*self.begin_ids, *ids, self.eos_id], len(self.begin_ids) + first))
        return result

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
