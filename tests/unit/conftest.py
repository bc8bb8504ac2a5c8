"""What tests of commands share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from levels import remember_levels as remember_levels

ROWS = [{"question": f"copy A{i}:", "answer": f"A{i}"} for i in range(9)]


@pytest.fixture
def keep_logging_and_warnings() -> Iterator[None]:
    """The command sets up logging and warning filters for its whole process; here it is only a guest."""
    import warnings

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\noops\n{"question": "x", "answer": ""}\n')
    return path
