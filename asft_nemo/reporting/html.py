"""What pages are made of: one self-contained document, tables, escaped text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def document(title: str, css: str, parts: Sequence[str]) -> str:
    """The whole page: HTML that refers to nothing outside itself.

    Args:
        title: not yet escaped.
        css: the style sheet.
        parts: HTML of the sections, in their order.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escaped(value: Any) -> str:
    """A value as it may stand in HTML."""
    return escape(str(value), quote=True)


def table_of(head: Sequence[str], rows: Sequence[str], caption: str, *, dense: bool = False) -> str:
    """A table whose caption stands below it; a dense one keeps its columns within a phone's screen. All HTML."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll"><table{" class=dense" if dense else ""}><caption>{caption}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row_of(name: str, cells: Sequence[str], *, own: bool = False) -> str:
    """A row of a table, set off where it is the `own` one. All HTML."""
    return f'<tr{" class=own" if own else ""}><th scope="row">{name}</th>{"".join(cells)}</tr>'
