"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

# What turns text into tokens, and nothing else of a Hugging Face directory.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
_CHAT_TEMPLATE = "chat_template.jinja"
_BLOCK = 1 << 20


def digest(path: Path) -> bytes:
    """Of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return found.digest()


def tokenizer_digests(folder: str | Path, *, chat_template: bool) -> Iterator[tuple[str, bytes]]:
    """Names and digests of a tokenizer's files, in a fixed order.

    Args:
        folder: Hugging Face directory.
        chat_template: whether its chat template counts.
    """
    for name in (*_TOKENIZER_FILES, *([_CHAT_TEMPLATE] if chat_template else [])):
        path = Path(folder) / name
        if path.is_file():
            yield name, digest(path)
