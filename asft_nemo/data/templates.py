"""From a record to the text the model sees, and which of its characters are learned. Adding a template =
one function + one row.

The end token belongs to no template: it is appended as a token after the text has been tokenised, so it is
learned exactly once.
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
    """A whole example as text; characters from `response_start` on are the response."""

    text: str
    response_start: int


def alpaca_prompt(instruction: str) -> str:
    """The alpaca prompt around an instruction; the response follows at once."""
    # Not str.format: braces in the instruction are the user's.
    return ALPACA.replace("{instruction}", instruction)


def raw_prompt(prompt: str) -> str:
    """The prompt as it is."""
    return prompt


PROMPTS: Mapping[str, Callable[[str], str]] = MappingProxyType({"alpaca": alpaca_prompt, "raw": raw_prompt})


def render(template: str, prompt: str, response: str) -> Rendered:
    """The example's text under a template.

    Raises:
        DataError: no template has this name.
    """
    if template not in PROMPTS:
        raise DataError(f"unknown data.template={template}: set one of {', '.join(PROMPTS)}")
    start = PROMPTS[template](prompt)
    return Rendered(start + response, len(start))
