"""The manifest of a prepared directory: what was prepared, from which bytes, with which settings and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.digests import tokenizer_digests
from asft_nemo.data.store import MANIFEST, PARTS, Counts, Part, summed, whole, write_json
from asft_nemo.errors import DataError

VERSION = 1  # of the form on disk; also of how rows become tokens, so that a change of either makes new parts
_FORMAT = "asft prepared data"


@dataclass(frozen=True)
class Source:
    """A file that was prepared.

    Attributes:
        name: as it was given.
        bytes, modified_ns, inode: of the file when its digest was taken, at `digested_ns`.
        sha256: of its bytes.
        part: name of the folder that holds its tokens.
        counts: what became of its rows.
    """

    name: str
    bytes: int
    modified_ns: int
    inode: int
    digested_ns: int
    sha256: str
    part: str
    counts: Counts


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds.

    Attributes:
        settings: those that shape tokens.
        tokenizer: SHA-256 of each of the tokenizer's files.
        suites: evaluation suites whose questions were taken out, and a SHA-256 over these; None where none were.
        sources: in order.
        made_by: version of asft_nemo.
    """

    settings: dict[str, Any]
    tokenizer: dict[str, str]
    suites: dict[str, Any] | None
    sources: tuple[Source, ...]
    made_by: str

    def total(self) -> Counts:
        """The counts of all sources together."""
        names = [item.name for item in fields(Counts)]
        return Counts(
            **{name: sum(getattr(source.counts, name) for source in self.sources) for name in names}
        )

    def digests(self) -> Iterator[bytes]:
        """A SHA-256 for each source: of its bytes, so that it is that of the raw file, unless rows were taken out."""
        for source in self.sources:
            changed = self.suites is not None and source.counts.contaminated
            yield bytes.fromhex(source.part if changed else source.sha256)

    def write(self, folder: Path) -> None:
        """Writes it; from then on the directory is complete."""
        values = {
            "format": _FORMAT,
            "version": VERSION,
            **asdict(self),
            "total": asdict(self.total()),
        }
        write_json(folder / MANIFEST, summed(values))


def settings_of(data: DataConfig) -> dict[str, Any]:
    """The settings that shape tokens."""
    return {
        "data.template": data.template,
        "data.loss_on": data.loss_on,
        **{f"data.fields.{name}": value for name, value in asdict(data.fields).items()},
    }


def tokenizer_of(folder: str | Path, template: str) -> dict[str, str]:
    """SHA-256 (hex) of each of a tokenizer's files that count under a template."""
    found = tokenizer_digests(folder, chat_template=template == "chat")
    return {name: part.hex() for name, part in found}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared directory.

    Raises:
        DataError: it was written by another version, or is damaged.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != _FORMAT:
            raise DataError(f"{path} is none that asft data prepare wrote: correct data.train")
        if value["version"] != VERSION:
            raise DataError(
                f"{folder} has version {value['version']} of the prepared form, and this asft reads version {VERSION}: run asft data "
                "prepare again"
            )
        if not whole(value):
            raise ValueError("its checksum does not match")
        sources = tuple(
            Source(**{**source, "counts": Counts(**source["counts"])}) for source in value["sources"]
        )
        return Manifest(
            settings=dict(value["settings"]),
            tokenizer=dict(value["tokenizer"]),
            suites=value["suites"],
            sources=sources,
            made_by=value["made_by"],
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read or is damaged: run asft data prepare again") from error


def open_parts(folder: Path, data: DataConfig, *, tokenizer_dir: str | Path) -> list[tuple[str, Part]]:
    """The sources of a prepared directory with their parts, mapped.

    Args:
        folder: the directory.
        data: the run's settings, `template` that of this entry.
        tokenizer_dir: of the run's tokenizer.

    Raises:
        DataError: it was prepared with other settings or another tokenizer, or is damaged: all of it is read once.
    """
    manifest = read_manifest(folder)
    _refuse_other_settings(folder, manifest.settings, settings_of(data))
    _refuse_other_tokenizer(folder, manifest.tokenizer, tokenizer_dir, data.template)
    return [(source.name, Part(folder / PARTS / source.part).check()) for source in manifest.sources]


def _refuse_other_settings(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            raise DataError(
                f"{folder} was prepared with {name}={_shown(there.get(name))} and the run has {name}={_shown(value)}: run asft data "
                f"prepare again with the run's settings, or set {name}={_shown(there.get(name))}"
            )


def _refuse_other_tokenizer(
    folder: Path, there: Mapping[str, str], tokenizer_dir: str | Path, template: str
) -> None:
    here = tokenizer_of(tokenizer_dir, template)
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise DataError(
                f"{folder} was prepared with a tokenizer whose {name} differs from that in {tokenizer_dir}: run asft data prepare again "
                f"with model.path={tokenizer_dir}"
            )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
