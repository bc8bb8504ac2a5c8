"""From a record to the text the model sees, and which of its characters are learned. Adding a template for one
prompt and one response = one function + one row; conversations are the chat template's (`asft_nemo.data.chat`).

The end token belongs to no template of this table: it is appended as a token after the text has been tokenised, so it
is learned exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from asft_nemo.errors import DataError

# Byte for byte the text of the ASFT authors' training runs: no newline after "Response:".
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)


class Rendered(NamedTuple):
    """A whole example as one text.

    Attributes:
        text: all of it; a chat template's own control tokens stand in guards (`asft_nemo.data.marking`).
        learned: spans [start, stop) of characters whose tokens are learned, ascending and disjoint.
        begin: the tokenizer's begin tokens are put in front; a chat template writes its own.
        end: the end token is appended and learned; False where the text ends its last turn itself.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    begin: bool = True
    end: bool = True


def alpaca_prompt(instruction: str) -> str:
    """The alpaca prompt around an instruction; the response follows at once."""
    # Not str.format: braces in the instruction are the user's.
    return ALPACA.replace("{instruction}", instruction)


def raw_prompt(prompt: str) -> str:
    """The prompt as it is."""
    return prompt


PROMPTS: Mapping[str, Callable[[str], str]] = MappingProxyType({"alpaca": alpaca_prompt, "raw": raw_prompt})


def render(template: str, prompt: str, response: str) -> Rendered:
    """The example's text under a template; the response is learned.

    Raises:
        DataError: no template has this name.
    """
    if template not in PROMPTS:
        raise DataError(f"unknown data.template={template}: set one of {', '.join(PROMPTS)}")
    start = PROMPTS[template](prompt)
    return Rendered(start + response, ((len(start), len(start) + len(response)),))
