"""The report of what tests did not run: gaps found in a real measurement, their reasons, and what makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import coverage_report as tool  # noqa: E402

pytest.importorskip("coverage")

CODE = """def half(number):
    if number % 2:
        # a remark
        number -= 1

        number -= 0
    if number > 1:
        number //= 2
    return number


def never():
    return 1
"""
TEST = """import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from asft_nemo.{package}.code import half


def test_half():
    assert half(4) == 2
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one module in each package and a test of its first function. The tool works on it."""
    for package in tool.PACKAGES:
        for name, text in {
            f"asft_nemo/{package}/__init__.py": "",
            f"asft_nemo/{package}/code.py": CODE,
            f"tests/unit/{package}/test_{package}_code.py": TEST.format(package=package),
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    (tmp_path / "asft_nemo" / "__init__.py").write_text("")
    (tmp_path / "tests" / "multiproc").mkdir()
    (tmp_path / "reasons.json").write_text("{}")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "REASONS", tmp_path / "reasons.json")
    monkeypatch.setattr(tool, "TESTS", tuple(f"tests/unit/{package}" for package in tool.PACKAGES))
    return tmp_path


def words(project: Path, *more: str) -> list[str]:
    return ["--out", str(project / "out"), "--work", str(project / "work"), *more]


def test_gaps_are_found_told_and_need_a_reason(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool.main(words(project)) == 1
    record = json.loads((project / "out" / "coverage.json").read_text())
    assert set(record["packages"]) == set(tool.PACKAGES)
    row = record["packages"]["losses"]
    assert (row["num_branches"], row["covered_branches"], row["branches"]) == (4, 2, 50.0)
    found = [(gap["line"], gap["code"], gap["what"]) for gap in record["gaps"]["asft_nemo/losses/code.py"]]
    assert found == [
        (2, "if number % 2:", "never goes on at line 4"),
        (4, "number -= 1", "not run"),
        (7, "if number > 1:", "never goes on at line 9"),
        (13, "return 1", "not run"),
    ]
    table = (project / "out" / "coverage.md").read_text()
    assert "| losses | 9 | 66.7 % | 4 | 50.0 % |" in table
    assert "| 13 | `return 1` | not run | **no reason given** |" in table

    # Reasons and the bar decide, over what was measured.
    codes = ("if number % 2:", "number -= 1", "if number > 1:", "return 1")
    why = {
        f"asft_nemo/{package}/code.py": dict.fromkeys(codes, "nobody needs it") for package in tool.PACKAGES
    }
    (project / "reasons.json").write_text(json.dumps(why))
    assert tool.main(words(project, "--again")) == 1
    monkeypatch.setattr(tool, "BAR", 50.0)
    assert tool.main(words(project, "--again")) == 0
    assert "no reason" not in (project / "out" / "coverage.md").read_text()


@pytest.mark.parametrize("when", ["before", "while", "never known"])
def test_a_measurement_of_other_code_is_not_written(
    when: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of these packages; the tests' own files may be others."""
    work, code = project / "work", project / "asft_nemo" / "data" / "code.py"

    def tests_run(*given: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        if when == "while":
            code.write_text(CODE + "\n\ndef more():\n    return 2\n")
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(tool.subprocess, "run", tests_run)
    monkeypatch.setattr(tool, "combined", lambda work: {})
    monkeypatch.setattr(tool, "record_of", lambda files, reasons: {"packages": {}, "gaps": {}})
    monkeypatch.setattr(tool, "table", lambda record: "")
    if when == "while":
        assert tool.main(words(project)) == 2
    else:
        assert tool.main(words(project)) == 0
        (project / "tests" / "unit" / "data" / "test_more.py").write_text("")
        assert tool.main(words(project, "--again")) == 0
        (project / "out" / "coverage.json").unlink()
        if when == "before":
            code.unlink()
        else:
            (work / "sources.json").unlink()
        assert tool.main(words(project, "--again")) == 2
    said = capsys.readouterr().err.strip()
    why = (
        f"{work} does not say of which code it is"
        if when == "never known"
        else f"asft_nemo/data/code.py changed since {work} was begun"
    )
    assert said == f"coverage_report: {why}: measure again, without --again"
    assert not (project / "out" / "coverage.json").exists()


@pytest.mark.long
def test_failing_tests_end_the_measurement(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "tests" / "unit" / "data" / "test_more.py").write_text("def test_no():\n    assert False\n")
    assert tool.main(words(project)) == 2
    assert "the tests end with code 1: mend them first" in capsys.readouterr().err
    assert not (project / "out").exists()


def test_forked_and_started_processes_count(tmp_path: Path) -> None:
    """Workers of the data's preparation are started, ranks are forked; both end without Python's own farewell."""
    (tmp_path / "code.py").write_text("def one(out):\n    out.append(1)\n\n\ndef two():\n    print(2)\n")
    (tmp_path / "main.py").write_text(
        "import os, subprocess, sys\nimport code_\n".replace("code_", "code as c")
        + "pid = os.fork()\nif not pid:\n    c.one([])\n    os._exit(0)\nos.waitpid(pid, 0)\n"
        + "subprocess.run([sys.executable, '-c', 'import code; code.two()'], check=True)\n"
    )
    (tmp_path / "ini").write_text(tool.SETTINGS.format(source=tmp_path, data=tmp_path / "data"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-m", "coverage"]
    for command in (
        ["run", f"--rcfile={tmp_path / 'ini'}", "main.py"],
        ["combine", "-q", f"--rcfile={tmp_path / 'ini'}"],
        ["json", "-q", f"--rcfile={tmp_path / 'ini'}", "-o", "out.json"],
    ):
        subprocess.run([*run, *command], cwd=tmp_path, env=environment, check=True, timeout=60)
    files: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())["files"]
    assert files["code.py"]["missing_lines"] == []
