"""asft data download: the published sets by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.commands.output import DONE, answer, progress_of
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_nemo.data.published import PublishedSet


def add_download(kinds: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    text = "published training and evaluation sets by name, resumed and checked"
    parser = kinds.add_parser("download", help=text, description=text, parents=[common])
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets; --list names them all")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to put them into")
    parser.add_argument("--list", action="store_true", help="the known sets with sizes, licences and sources")
    parser.set_defaults(command=_download)


def _download(arguments: argparse.Namespace) -> int:
    from asft_nemo.data.download import chosen, download
    from asft_nemo.data.published import SETS

    sets = chosen(arguments.names)
    if arguments.list:
        listed = sets or dict(SETS)
        answer(arguments, {name: _values(found) for name, found in listed.items()}, _table(listed))
        return DONE
    if not sets:
        raise UserError("asft data download got no name: asft data download --list shows the known sets")
    if arguments.out is None:
        raise UserError("asft data download needs a folder: give --out=DIR")
    files = [file for found in sets.values() for file in found.files]
    with progress_of("download") as progress:
        fetched = download(files, arguments.out, progress=progress)
    lines = [
        f"{found.path}: {found.size} bytes, SHA-256 {found.sha256} "
        f"({'as published' if found.known else 'as first seen, for none is published'})"
        f"{'' if found.fresh else ', was there'}"
        for found in fetched
    ]
    values = [
        {
            "path": str(found.path),
            "bytes": found.size,
            "sha256": found.sha256,
            "published_digest": found.known,
            "fetched": found.fresh,
        }
        for found in fetched
    ]
    answer(arguments, {"files": values}, "\n".join(lines))
    return DONE


def _values(found: PublishedSet) -> dict[str, Any]:
    return {
        "what": found.what,
        "rows": found.rows,
        "licence": found.licence,
        "files": [
            {"name": file.name, "source": str(file.source), "bytes": file.size, "sha256": file.sha256}
            for file in found.files
        ],
    }


def _table(sets: dict[str, PublishedSet]) -> str:
    lines: list[str] = []
    for name, found in sets.items():
        sizes = [file.size for file in found.files]
        size = f"{sum(size or 0 for size in sizes) / 1e6:.2f} MB" if all(sizes) else "size unknown"
        rows = f"{found.rows} rows" if found.rows else "rows unknown"
        checked = (
            "checksum known" if all(file.sha256 for file in found.files) else "checksum of the first download"
        )
        lines.append(f"{name}\n  {found.what}; {rows}, {size}, {checked}\n  licence: {found.licence}")
        lines += [f"  {file.name} <- {file.source}" for file in found.files]
    return "\n".join(lines)
