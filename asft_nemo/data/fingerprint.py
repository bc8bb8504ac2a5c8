"""A short name for exactly this data: equal when and only when the same items would come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.files import expand

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


def fingerprint(files: Iterable[str | Path], data: DataConfig, *, tokenizer_dir: str | Path) -> str:
    """SHA-256 (hex) over the files' bytes in order, the settings that shape items, and the tokenizer's files.

    File names and folders do not count, so a moved copy has the same fingerprint.
    """
    settings = {
        "template": data.template,
        "fields": _field_names(data),
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "loss_on": data.loss_on,
        "on_bad_row": data.on_bad_row,
        "on_too_long": data.on_too_long,
        **_own_templates(data),
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in _parts(files):
        total.update(_digest(path))
    for name in (*_TOKENIZER_FILES, *([_CHAT_TEMPLATE] if _reads_chat_template(data) else [])):
        path = Path(tokenizer_dir) / name
        if path.is_file():
            total.update(name.encode() + _digest(path))
    return total.hexdigest()


def files_fingerprint(files: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the files' bytes in order: which example has which number."""
    return hashlib.sha256(b"".join(map(_digest, _parts(files)))).hexdigest()


def tokenizer_fingerprint(tokenizer_dir: str | Path) -> str:
    """SHA-256 (hex) over the tokenizer's files, its chat template included."""
    paths = ((name, Path(tokenizer_dir) / name) for name in (*_TOKENIZER_FILES, _CHAT_TEMPLATE))
    return hashlib.sha256(
        b"".join(name.encode() + _digest(path) for name, path in paths if path.is_file())
    ).hexdigest()


def template_fingerprint(data: DataConfig) -> str:
    """The settings that turn a record into tokens and say which are learned, readable."""
    prompt, response, *others = _field_names(data)
    more = "".join(f", {name}" for name in others)
    more += "".join(f", {key}={'/'.join(names)}" for key, names in _own_templates(data).items())
    return f"{data.template}, prompt={prompt}, response={response}{more}, loss_on={data.loss_on}"


def _own_templates(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """The templates of single entries; only where set, so that older fingerprints hold."""
    given = {"templates": data.templates, "validation_templates": data.validation_templates}
    return {key: names for key, names in given.items() if names}


def _reads_chat_template(data: DataConfig) -> bool:
    return "chat" in (data.template, *data.templates, *data.validation_templates)


def _field_names(data: DataConfig) -> list[str | None]:
    """All of `data.fields`; those of conversations and inputs only where set, so that older fingerprints hold."""
    others = {"input": data.fields.input, "messages": data.fields.messages}
    return [
        data.fields.prompt,
        data.fields.response,
        *(f"{name}={value}" for name, value in others.items() if value is not None),
    ]


def _parts(files: Iterable[str | Path]) -> Iterator[Path]:
    return (path for file in files for path in expand(file))


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.digest()
