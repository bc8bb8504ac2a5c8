"""Records from the files of a run, in order, each with its place.

Every row that cannot be used is reported with file, line and reason; the readers never raise for a bad
row, so that all of them can be counted. A file that cannot be read at all raises `DataError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data.files import Rows, expand, rows
from asft_nemo.data.records import Conversation, Form, form_of, no_form, read_row
from asft_nemo.errors import DataError

SHOWN_ROWS = 20  # bad rows listed in an error


class BadRow(NamedTuple):
    """A line that cannot be used."""

    file: str
    line: int  # or row of a Parquet file; 1 for the first
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One usable row."""

    conversation: Conversation
    file: str
    line: int
    domain: int  # which entry of the files, counted from 0


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
    """All rows of all files, in order, each as a record or as the reason why it is none. Blank lines are
    skipped.

    Args:
        files: entries of `data.train`: files, patterns or directories; each is a domain.
        fields: where to find the texts.

    Raises:
        DataError: a file is missing, cannot be read, or has no row.
    """
    for domain, entry in enumerate(files):
        for path in expand(entry):
            yield from _of_file(path, fields, domain)


def _of_file(path: Path, fields: FieldsConfig, domain: int) -> Iterator[Record | BadRow]:
    empty = True
    for record in records_of(rows(path), fields, file=str(path), domain=domain):
        empty = False
        yield record
    if empty:
        raise empty_error(path)


def records_of(
    numbered: Rows, fields: FieldsConfig, *, file: str, domain: int, form: Form | None = None
) -> Iterator[Record | BadRow]:
    """Rows of one file, in order, each as a record or as the reason why it is none.

    Args:
        numbered: rows of the file, from its beginning or from later on.
        fields: where to find the texts.
        file, domain: of the records.
        form: what earlier rows have shown the form to be; None = the first of these rows that has a known form shows it.
    """
    for line, row in numbered:
        if isinstance(row, dict) and form is None:
            form = form_of(row, fields)
        result = row if isinstance(row, str) else _read(row, form)
        if isinstance(result, str):
            yield BadRow(file, line, result)
        else:
            yield Record(result, file=file, line=line, domain=domain)


def empty_error(path: Path) -> DataError:
    """The error about a file without a row."""
    return DataError(f"data file {path} is empty: give a file with one JSON object a line")


def _read(row: dict[str, Any], form: Form | None) -> Conversation | str:
    return no_form(row) if form is None else read_row(row, form)


def refuse_bad_rows(rows: Sequence[BadRow], data: DataConfig) -> None:
    """Says whether a run may go on with these bad rows left out.

    Raises:
        DataError: there is one and `data.on_bad_row=fail`, or there are more than `data.max_bad_rows`; the first ones in full.
    """
    most = data.max_bad_rows if data.on_bad_row == "skip" else 0
    if len(rows) <= most:
        return
    plural = "rows" if len(rows) != 1 else "row"
    what = f"{len(rows)} bad {plural}: correct them, or set data.on_bad_row=skip"
    if data.on_bad_row == "skip":
        what = f"{len(rows)} bad rows are more than data.max_bad_rows={most}: correct them, or raise data.max_bad_rows"
    shown = "\n".join(f"  {row}" for row in rows[:SHOWN_ROWS])
    rest = f"\n  ... and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    raise DataError(f"{what}\n{shown}{rest}")
