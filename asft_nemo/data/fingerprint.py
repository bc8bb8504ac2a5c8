"""A short name for exactly this data: equal when and only when the same items would come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.digests import digest, tokenizer_digests
from asft_nemo.data.files import expand
from asft_nemo.data.manifest import read_manifest
from asft_nemo.data.store import is_prepared


def fingerprint(files: Iterable[str | Path], data: DataConfig, *, tokenizer_dir: str | Path) -> str:
    """SHA-256 (hex) over the files' bytes in order, the settings that shape items, and the tokenizer's files.

    File names and folders do not count, so a moved copy has the same fingerprint, and so has the form that `asft data prepare` made of them.

    Args:
        files: the entries of `data.train`, then those of `data.validation`.
        data: the settings; its own lists of files are not looked at.
        tokenizer_dir: Hugging Face directory.
    """
    entries = [list(_digests([entry])) for entry in files]
    counts = [len(entry) for entry in entries]
    settings = {
        "template": data.template,
        "fields": _field_names(data),
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "loss_on": data.loss_on,
        "on_bad_row": data.on_bad_row,
        "on_too_long": data.on_too_long,
        **_own_templates(data),
        **_templated_files(data, counts[: len(data.templates)], counts[-len(data.validation_templates) :]),
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in chain.from_iterable(entries):
        total.update(part)
    for name, part in tokenizer_digests(tokenizer_dir, chat_template=_reads_chat_template(data)):
        total.update(name.encode() + part)
    return total.hexdigest()


def files_fingerprint(files: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the files' bytes in order: which example has which number."""
    return hashlib.sha256(b"".join(_digests(files))).hexdigest()


def tokenizer_fingerprint(tokenizer_dir: str | Path) -> str:
    """SHA-256 (hex) over the tokenizer's files, its chat template included."""
    parts = tokenizer_digests(tokenizer_dir, chat_template=True)
    return hashlib.sha256(b"".join(name.encode() + part for name, part in parts)).hexdigest()


def template_fingerprint(data: DataConfig) -> str:
    """The settings that turn a record into tokens and say which are learned, readable."""
    prompt, response, *others = _field_names(data)
    more = "".join(f", {name}" for name in others)
    more += "".join(f", {key}={'/'.join(names)}" for key, names in _own_templates(data).items())
    train, held_out = (
        _counts(files) if names else []
        for files, names in ((data.train, data.templates), (data.validation, data.validation_templates))
    )
    for key, counts in _templated_files(data, train, held_out).items():
        more += f", {key}={'/'.join(map(str, counts))}"
    return f"{data.template}, prompt={prompt}, response={response}{more}, loss_on={data.loss_on}"


def _own_templates(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """The templates of single entries; only where set, so that older fingerprints hold."""
    given = {"templates": data.templates, "validation_templates": data.validation_templates}
    return {key: names for key, names in given.items() if names}


def _templated_files(
    data: DataConfig, train: Sequence[int], held_out: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """How many files each entry with a template of its own has: which file has which template. Only where an entry has not just one, so
    that older fingerprints hold.
    """
    given = {
        "templates_files": train if data.templates else (),
        "validation_templates_files": held_out if data.validation_templates else (),
    }
    return {key: tuple(counts) for key, counts in given.items() if any(count != 1 for count in counts)}


def _counts(files: Iterable[str | Path]) -> list[int]:
    """Every entry's number of files."""
    return [
        len(read_manifest(Path(entry)).sources) if is_prepared(entry) else len(expand(entry))
        for entry in files
    ]


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


def _digests(files: Iterable[str | Path]) -> Iterator[bytes]:
    """Of every file's bytes, in order; a prepared directory knows those of its sources."""
    for entry in files:
        if is_prepared(entry):
            yield from read_manifest(Path(entry)).digests()
        else:
            yield from map(digest, expand(entry))
