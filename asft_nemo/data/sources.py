"""Records from files: JSON Lines, one object a line.

Every line that cannot be used is reported with file, line and reason; the readers never raise for a bad
row, so that all of them can be counted. A file that cannot be read at all raises `DataError`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from asft_nemo.config.schema import FieldsConfig
from asft_nemo.data.records import Conversation, Form, form_of, kind, no_form, read_row
from asft_nemo.errors import DataError

MOST_BYTES = 10 << 20  # of a row; longer ones are bad rows and never wholly in memory
SHOWN_ROWS = 20  # bad rows listed in an error
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is a prefix of it
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ARCHIVES = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
    (b"PAR1", "Parquet"),
)


class BadRow(NamedTuple):
    """A line that cannot be used."""

    file: str
    line: int  # 1 for the first
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One usable row."""

    conversation: Conversation
    file: str
    line: int
    domain: int  # which of the files, counted from 0


def domain_names(files: Sequence[str | Path]) -> tuple[str, ...]:
    """A name for each file: its stem, with as many of its folders in front as set it apart from the others; a
    number behind where that is not enough.
    """
    paths = [(*Path(file).parent.parts, Path(file).stem) for file in files]
    names: list[str] = []
    for path in paths:
        others = [other for other in paths if other != path]
        depth = 1
        while depth < len(path) and any(other[-depth:] == path[-depth:] for other in others):
            depth += 1
        name, number = "/".join(path[-depth:]), 1
        while name in names:
            number += 1
            name = f"{'/'.join(path[-depth:])}-{number}"
        names.append(name)
    return tuple(names)


def read_records(files: Iterable[str | Path], fields: FieldsConfig) -> Iterator[Record | BadRow]:
    """All lines of all files, in order, each as a record or as the reason why it is none. Blank lines are
    skipped.

    Raises:
        DataError: a file is missing, is not text in UTF-8, or has no line.
    """
    for domain, file in enumerate(files):
        empty, form = True, None
        for line, raw in _lines(Path(file)):
            empty = False
            parsed = _parse(raw)
            if isinstance(parsed, dict) and form is None:
                form = form_of(parsed, fields)
            result = parsed if isinstance(parsed, str) else _read(parsed, form)
            if isinstance(result, str):
                yield BadRow(str(file), line, result)
            else:
                yield Record(result, file=str(file), line=line, domain=domain)
        if empty:
            raise DataError(f"data file {file} is empty: give a file with one JSON object a line")


def _read(row: dict[str, Any], form: Form | None) -> Conversation | str:
    return no_form(row) if form is None else read_row(row, form)


def bad_rows_error(rows: list[BadRow]) -> DataError:
    """The error that lists bad rows: the first ones in full, and how many there are."""
    shown = "\n".join(f"  {row}" for row in rows[:SHOWN_ROWS])
    rest = f"\n  ... and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    plural = "rows" if len(rows) != 1 else "row"
    return DataError(f"{len(rows)} bad {plural}: correct them, or set data.on_bad_row=skip\n{shown}{rest}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers; one line is in memory at a time."""
    if not path.is_file():
        raise DataError(f"data file {path} does not exist (looked in {Path.cwd()}): correct data.train")
    try:
        with path.open("rb") as stream:
            first = True
            _refuse_other_formats(path, stream.read(4))
            stream.seek(0)
            for number, raw in enumerate(_split(stream), start=1):
                if number == 1 and raw.startswith(codecs.BOM_UTF8):
                    raw = raw[len(codecs.BOM_UTF8) :]
                if not raw.strip():
                    continue
                if first and raw.lstrip().startswith(b"["):
                    raise DataError(
                        f"data file {path} is one JSON array: write one object a line (jq -c '.[]' does it)"
                    )
                first = False
                yield number, raw
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}): correct its permissions"
        ) from error


def _split(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines; of one that is too long, its first bytes alone."""
    while raw := stream.readline(MOST_BYTES + 1):
        rest = raw
        while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MOST_BYTES + 1)
        yield raw


def _refuse_other_formats(path: Path, start: bytes) -> None:
    for mark, encoding in _ENCODINGS:
        if start.startswith(mark):
            raise DataError(f"data file {path} is {encoding} text: convert it to UTF-8")
    for mark, form in _ARCHIVES:
        if start.startswith(mark):
            raise DataError(f"data file {path} is {form}, which is not read yet: unpack it to JSON Lines")


def _parse(raw: bytes) -> dict[str, Any] | str:
    """A line's object, or why it is none."""
    if len(raw) > MOST_BYTES:
        return f"longer than {MOST_BYTES >> 20} MiB: split it"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    if isinstance(value, list):
        return "a JSON array where one object a line is needed"
    if not isinstance(value, dict):
        return f"a JSON {kind(value)} where an object is needed"
    return value
