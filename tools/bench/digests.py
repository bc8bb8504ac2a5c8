"""Of which code something was measured: a digest of every source file, kept beside what was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

FILE = "sources.json"


def digest(file: Path) -> str:
    """Of what is in the file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digests(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> digest of the files below `root`."""
    return {name: digest(root / name) for name in sorted(names)}


def keep(work: Path, found: Mapping[str, str]) -> None:
    """Writes them into a work folder, whole or not at all."""
    partial = work / f".{FILE}"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(work / FILE)


def kept(work: Path) -> dict[str, str] | None:
    """What a work folder has; None where it has none."""
    file = work / FILE
    return json.loads(file.read_text()) if file.is_file() else None


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names whose files differ, or that one of the two has not."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
