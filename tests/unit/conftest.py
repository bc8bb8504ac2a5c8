"""What tests of commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from levels import remember_levels as remember_levels

ROWS = [{"question": f"copy A{i}:", "answer": f"A{i}"} for i in range(9)]


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
