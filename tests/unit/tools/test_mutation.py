"""The report of wrong changes that no test noticed: what is copied, counted and argued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import mutation as tool  # noqa: E402

DENSE = "asft_nemo.losses.dense.x_dense_loss__mutmut_"
TABLE = "asft_nemo.objectives.table.x_names__mutmut_"


def test_what_is_copied_can_be_changed_and_tested(tmp_path: Path) -> None:
    tool.prepare(tmp_path)
    assert (tmp_path / "asft_nemo" / "losses" / "dense.py").is_file()
    assert (tmp_path / "tests" / "unit" / "losses" / "loss_cases.py").is_file()
    assert not (tmp_path / "tests" / "unit" / "losses" / "test_shapes.py").exists()
    settings = (tmp_path / "pyproject.toml").read_text()
    assert settings.count("[tool.") == 2
    assert "--import-mode=importlib" in settings
    assert 'source_paths = ["asft_nemo"]' in settings
    before = (tmp_path / "asft_nemo" / "losses" / "dense.py").stat().st_mtime_ns
    tool.prepare(tmp_path)
    assert (tmp_path / "asft_nemo" / "losses" / "dense.py").stat().st_mtime_ns == before, (
        "it would be tried anew"
    )


def test_outcomes_are_mutmuts(tmp_path: Path) -> None:
    folder = tmp_path / "mutants" / "asft_nemo" / "losses"
    folder.mkdir(parents=True)
    codes = {
        f"{DENSE}1": 1,
        f"{DENSE}2": 0,
        f"{DENSE}3": None,
        f"{DENSE}4": 33,
        f"{DENSE}5": 36,
        f"{DENSE}6": -11,
        f"{DENSE}7": 3,
    }
    (folder / "dense.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    assert list(tool.outcomes(tmp_path).values()) == [
        "killed",
        "survived",
        "left",
        "no test",
        "too slow",
        "crashed",
        "killed",
    ]


def test_what_is_left_or_was_not_noticed_is_tried() -> None:
    assert tool.to_try({}, ["objectives", "losses.dense"]) == [
        "asft_nemo.objectives*",
        "asft_nemo.losses.dense*",
    ]
    found = {
        f"{DENSE}1": "killed",
        f"{DENSE}2": "survived",
        f"{DENSE}3": "left",
        f"{TABLE}1": "no test",
        f"{TABLE}2": "too slow",
    }
    assert tool.to_try(found, ["losses"]) == [f"{DENSE}2", f"{DENSE}3"]
    assert tool.to_try(found, ["objectives", "losses"]) == [f"{DENSE}2", f"{DENSE}3", f"{TABLE}1"]


def test_survivors_are_counted_by_module_and_told_with_their_reason() -> None:
    found = {
        f"{DENSE}1": "killed",
        f"{DENSE}2": "survived",
        f"{TABLE}1": "no test",
        f"{TABLE}2": "left",
        f"{TABLE}3": "too slow",
    }
    changed = {f"{DENSE}2": ("a | b", "a"), f"{TABLE}1": ("x", "y")}
    groups = [{"why": "It is the same.", "mutants": [["losses.dense", "a | b", "a"]]}]
    record = tool.record_of(found, changed, groups)
    text = tool.table(record)
    assert "| losses.dense | 2 | 1 | 1 | 0 | 0 |" in text
    assert "| objectives.table | 3 | 1 | 0 | 1 | 1 |" in text
    assert "| all | 5 | 2 | 1 | 1 | 1 |" in text
    assert "It is the same. (1)\n" in text
    assert r"| losses.dense | `a \| b` | `a` |" in text
    assert "**No reason given.** (1)" in text
    assert "| objectives.table | `x` | `y` |" in text


def test_a_change_is_told_as_mutmut_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffs = pytest.importorskip("mutmut.mutation.diff_apply")
    diff = (
        "--- a\n+++ b\n@@ -1 +1 @@\n def f(x):\n-    return (x\n-        + 1)\n+    return (x\n+        - 1)"
    )
    monkeypatch.setattr(diffs, "get_diff_for_mutant", lambda name: diff)
    assert tool.changes(tmp_path, [f"{DENSE}2"]) == {f"{DENSE}2": ("return (x + 1)", "return (x - 1)")}
