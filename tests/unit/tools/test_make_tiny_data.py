"""The shipped rows are the tool's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_files_are_what_the_tool_makes_and_no_question_is_trained_on() -> None:
    spec = importlib.util.spec_from_file_location("make_tiny_data", ROOT / "tools" / "make_tiny_data.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    texts = tool.files()
    assert {name: (ROOT / "assets" / "tiny-data" / name).read_text() for name in texts} == texts
    asked = {line.split('"')[3] for line in texts["swap.jsonl"].splitlines()}
    assert len(asked) == 16
    assert not asked & {line.split('"')[3] for line in texts["train.jsonl"].splitlines()}
