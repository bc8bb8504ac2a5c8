"""Which files of an unfinished directory are complete, so that an interrupted conversion goes on instead of starting over."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

JOURNAL_NAME = ".journal"


def files_identity(files: Iterable[Path]) -> list[list[object]]:
    """What tells, without reading them, that files are those of the last time: place, inode, bytes, times of the last changes."""
    return [
        [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for file in sorted(files)
        for stat in [file.stat()]
    ]


class Journal:
    """A line of JSON per complete file of a directory, written once the file is on disk. Thread safe.

    The first line says what the files are parts of. Where another job left the directory, nothing in it counts; a last line that was
    cut by a kill does not either, nor does a file that is gone or of another size.

    Args:
        directory: holds the files and the journal.
        job: what decides the content of every file, as plain values.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]):
        self._directory, self._lock = directory, threading.Lock()
        self._path = directory / JOURNAL_NAME
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._first = json.dumps({"job": digest})
        self._files = self._read()
        fresh = self._path.with_name(f"{JOURNAL_NAME}.new")
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(
                "".join(f"{line}\n" for line in (self._first, *map(json.dumps, self._files.values())))
            )
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self._path)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        if not lines or lines[0] != self._first:
            return {}
        found: dict[str, dict[str, Any]] = {}
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                name, nbytes, _ = entry["name"], entry["bytes"], entry["facts"]
                file = self._directory / name
            except (ValueError, KeyError, TypeError):  # cut by a kill, or not written by us
                break
            if file.is_file() and file.stat().st_size == nbytes:
                found[name] = entry
        return found

    @property
    def names(self) -> frozenset[str]:
        """The complete files, relative to the directory."""
        return frozenset(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of the complete files."""
        return sum(entry["bytes"] for entry in self._files.values())

    def facts(self, name: str) -> Any:
        """What was said of a complete file; None where the file is not complete."""
        entry = self._files.get(name)
        return None if entry is None else entry["facts"]

    def add(self, name: str, facts: Any) -> None:
        """Says that a file is complete; it must have been synced.

        Args:
            name: relative to the directory.
            facts: plain values, not None.
        """
        entry = {"name": name, "bytes": (self._directory / name).stat().st_size, "facts": facts}
        with self._lock, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            self._files[name] = entry

    def remove(self) -> None:
        """Takes the journal out of a directory that is complete."""
        self._path.unlink()
